"""Copies of runs in an object store, for the commands that read them."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from job.artifacts.object_store import Store, is_store_url
from job.artifacts.stored_places import note_place
from job.errors import InputNotFound

# what no command reads: temporary files, saved positions, offline W&B runs, decoded images
_UNREAD = re.compile(
    r"(.*/)?(\..+\.\d+\.(tmp|old)|[^/]+\.damaged/.*|checkpoints/.*/state\.safetensors|"
    r"(wandb|cache|figures)/.*)"
)
_WEIGHTS = re.compile(r".*\.safetensors")
_copies: dict[str, Path] = {}  # folder of the copy by URL


def local_path(path: str, *, weights: bool) -> str:
    """Return ``path``, or for the URL of an object store a local copy of what is there now.

    Without ``weights`` the copy is small: the files that describe runs. It has the times of change
    of the store, and is removed when the command ends. Raises InputNotFound when there is nothing,
    StorageError, OutputError or UsageError when the store cannot be read.
    """
    if not is_store_url(path):
        return path
    store = Store(path)
    names = {
        name: time
        for name, time in store.list().items()
        if not _UNREAD.fullmatch(name) and (weights or not _WEIGHTS.fullmatch(name))
    }
    if not names:
        raise InputNotFound(f"{store.url} holds no files")
    if path not in _copies:
        base = Path(tempfile.mkdtemp(prefix="gammaslim-"))
        atexit.register(shutil.rmtree, base, ignore_errors=True)
        _copies[path] = base / store.name
        note_place(_copies[path], path)
    for name, time in names.items():
        copy = _copies[path] / name if name else _copies[path]
        if time is not None and copy.is_file() and copy.stat().st_mtime == time:
            continue  # of an earlier look
        with suppress(FileNotFoundError):  # deleted meanwhile
            store.get(name, copy)
            if (time := _beat(copy) or time) is not None:
                os.utime(copy, (time, time))
    return str(_copies[path])


def _beat(copy: Path) -> float | None:
    """Return the last heartbeat in a copy of a lock."""
    if copy.name != "lock.json":
        return None
    with suppress(OSError, ValueError, TypeError, KeyError):
        lock = json.loads(copy.read_text("utf-8"))
        beat = float(lock.pop("beat")) / 1e9
        copy.write_text(json.dumps(lock))
        return beat
    return None
