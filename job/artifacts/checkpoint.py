"""Checkpoints: positions of a run on disk, verified on load, without any pickle.

``checkpoints/RRR-EEEE-BBBBBBB/`` (round, epoch, batch) holds the tensors (state.safetensors), the
other values (position.json) and, written last, a manifest of sizes and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes

from job.artifacts.json_records import from_json, to_json
from job.errors import StorageError, reading, shown, writing
from job.files import discard, new_directory
from job.training.position import Position, RoundProgress, TrainingProgress

if TYPE_CHECKING:
    from pathlib import Path

KEPT = 2  # checkpoints
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
    files = {
        "state.safetensors": tensor_bytes(tensors),
        "position.json": json.dumps({**rest, "values": values}).encode(),
    }
    manifest = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    path = folder / position.name
    with new_directory(path) as temporary, writing(path):
        for name, content in files.items():
            (temporary / name).write_bytes(content)
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
    files = {}
    for name in ("state.safetensors", "position.json"):
        content = (path / name).read_bytes()
        if len(content) != manifest[name]["size"]:
            raise ValueError(f"{name} has {len(content):,} bytes, not {manifest[name]['size']:,}")
        if hashlib.sha256(content).hexdigest() != manifest[name]["sha256"]:
            raise ValueError(f"{name} does not match its SHA-256")
        files[name] = content
    rest = json.loads(files["position.json"])
    position = Position(
        round=rest["round"],
        epoch=rest["epoch"],
        batch=rest["batch"],
        training=from_json(TrainingProgress, rest["values"]),
        tensors=load_tensors(files["state.safetensors"]),
        run=from_json(RoundProgress, rest["values"]),
    )
    if position.name != path.name:
        raise ValueError(f"position.json is of {position.name}")
    return position
