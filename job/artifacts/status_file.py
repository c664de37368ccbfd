"""``status.json`` of a run: written so that the last one has space on a full disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from job.artifacts.json_records import from_json, to_json
from job.artifacts.records import StatusRecord
from job.errors import StorageError
from job.files import is_file, read_json, remove, write_bytes, write_json

if TYPE_CHECKING:
    from pathlib import Path

STATUS_FILE = "status.json"
RESERVE = 8192  # bytes of a file that makes room for the last status.json on a full disk


def read_status_file(run: Path) -> StatusRecord | None:
    """Read ``status.json``; None if there is none or it is damaged."""
    try:
        return from_json(StatusRecord, read_json(run / STATUS_FILE))
    except (FileNotFoundError, ValueError):
        return None


def write_status_file(run: Path, record: StatusRecord) -> None:
    """Replace ``status.json``; a reserve file keeps space for the last one. Raises StorageError."""
    path, reserve = run / STATUS_FILE, run / ".reserve"
    if record.state == "running":
        if not is_file(reserve):
            write_bytes(reserve, os.urandom(RESERVE))  # no file system stores this smaller
        write_json(path, to_json(record))
        return
    try:
        write_json(path, to_json(record))
    except StorageError:
        remove(reserve)
        write_json(path, to_json(record))
    remove(reserve)
