"""Small files from outside, read with a bound: a wrong one must not fill the memory."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any

from job.errors import reading

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 64 << 20  # far above any configuration, model card or history of epochs


def read_bytes(path: Path) -> bytes:
    """The content of ``path``; raises StorageError, OSError, or ValueError above 64 MiB."""
    with reading(path), path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    return content


def read_json(path: Path) -> Any:
    """The value in ``path``; raises OSError, or ValueError when it is not JSON in UTF-8."""
    try:
        return json.loads(read_bytes(path).decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of ``text``; raises ValueError when it is not TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
