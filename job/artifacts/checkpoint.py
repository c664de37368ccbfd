"""Checkpoints: positions of a run on disk, verified on load, without any pickle.

``checkpoints/RRR-EEEE-BBBBBBB/`` (round, epoch, batch) holds the tensors (state.safetensors), the
other values (position.json) and, written last, a manifest of sizes and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

from job.artifacts.json_records import from_json, to_json
from job.artifacts.tensor_file import read_tensors, write_tensors
from job.errors import StorageError, reading, shown, writing
from job.files import discard, new_directory
from job.training.checkpoint_content import Position, RoundProgress, TrainingProgress

if TYPE_CHECKING:
    from pathlib import Path

KEPT = 2  # checkpoints
_FILES = ("state.safetensors", "position.json")  # of a checkpoint, without its manifest
_NAME = re.compile(r"(\d{3})-(\d{4})-(\d{7})")
_DAMAGED = ".damaged"  # suffix of a skipped checkpoint, which must not count as kept


def save_position(folder: Path, position: Position) -> None:
    """Write ``position`` into ``folder`` atomically, and keep only it and the previous one.

    Raises StorageError.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in position.tensors.items()}
    assert position.run
    values = to_json(position.training) | to_json(position.run)
    rest = {"round": position.round, "epoch": position.epoch, "batch": position.batch}
    path = folder / position.name
    with new_directory(path) as temporary, writing(path):
        write_tensors(temporary / "state.safetensors", tensors)
        (temporary / "position.json").write_text(json.dumps({**rest, "values": values}))
        manifest = {
            name: {"size": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
            for name in _FILES
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    names = _names(folder)
    before = [name for name in names if name <= position.name]
    # later checkpoints are from an attempt that this one repeats
    for name in set(names) - set(before[-KEPT:]):
        discard(folder / name)
    for damaged in folder.glob(f"*{_DAMAGED}"):
        discard(damaged)


def newest_position(folder: Path, round_index: int) -> tuple[Position | None, list[str]]:
    """Load the newest intact position of a round; also return the problems of newer ones.

    Newer checkpoints that are damaged are renamed. The position is None when the round has no
    checkpoint. Raises StorageError when all of them are damaged: nothing may be overwritten then.
    """
    problems: list[str] = []
    damaged: list[Path] = []
    for name in reversed(_names(folder)):
        if int(name[:3]) != round_index:
            continue
        try:
            position = _load_position(folder / name)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problems.append(f"checkpoint {shown(folder / name)} is damaged: {error}")
            damaged.append(folder / name)
            continue
        for path in damaged:
            with writing(path):
                path.rename(path.with_name(path.name + _DAMAGED))
        return position, problems
    if problems:
        raise StorageError(
            f"no intact checkpoint of round {round_index}: {'; '.join(problems)}; restore one, or "
            f"remove {shown(folder)} to repeat the round"
        )
    return None, []


def _names(folder: Path) -> list[str]:
    try:
        with reading(folder):
            return sorted(entry.name for entry in folder.iterdir() if _NAME.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def _load_position(path: Path) -> Position:
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    for name in _FILES:
        size = (path / name).stat().st_size
        if size != manifest[name]["size"]:
            raise ValueError(f"{name} has {size:,} bytes, not {manifest[name]['size']:,}")
        if _sha256(path / name) != manifest[name]["sha256"]:
            raise ValueError(f"{name} does not match its SHA-256")
    rest = json.loads((path / "position.json").read_text("utf-8"))
    position = Position(
        round=rest["round"],
        epoch=rest["epoch"],
        batch=rest["batch"],
        training=from_json(TrainingProgress, rest["values"]),
        tensors=read_tensors(path / "state.safetensors"),
        run=from_json(RoundProgress, rest["values"]),
    )
    if position.name != path.name:
        raise ValueError(f"position.json is of {position.name}")
    return position


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
