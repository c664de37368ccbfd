"""The files of a run directory that are complete together, and the order in which to store them."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ATTEMPT = ".attempt"  # names the job that last wrote to the store
COMPLETES = {"rounds": "model.json", "checkpoints": "manifest.json"}  # written last in each folder
LEFT_OUT = {"STOP", "lock.json", ".reserve", "cache", ATTEMPT}  # of a run directory
GROWING = ("metrics.jsonl", "wandb")  # files that are not replaced as a whole
FIRST_FILES = ("config.toml", "metrics.jsonl")
_TEMPORARY = re.compile(r"\..+\.\d+\.(tmp|old)|.+\.damaged")
Stamp = tuple[int, int, int]  # size, time of change in ns, inode


@dataclass(frozen=True)
class Unit:
    """Files that are complete together: ``stamps`` by name, and the one that completes them."""

    stamps: dict[str, Stamp]
    marker: str = ""

    @property
    def order(self) -> tuple[int, int, str]:
        """Sort key in the order of upload."""
        name = next(iter(self.stamps))
        if name in FIRST_FILES:
            return FIRST_FILES.index(name), 0, name
        late = name.split("/")[0] in GROWING
        changed = max(stamp[1] for stamp in self.stamps.values())
        return (3 if late else 2), changed, name


def units_of(run: Path) -> list[Unit]:
    """Return the complete files of the run directory ``run``."""
    units: dict[str, dict[str, Stamp]] = {}
    for name in _files_below(run):
        top, _, rest = name.partition("/")
        unit = f"{top}/{rest.partition('/')[0]}" if top in COMPLETES else name
        with suppress(FileNotFoundError):
            units.setdefault(unit, {})[name] = stamp_of(run / name)
    return [Unit(stamps, next(filter(is_marker, stamps), "")) for stamps in units.values()]


def is_marker(name: str) -> bool:
    """Return whether a file completes the round or checkpoint that it is in."""
    return name.partition("/")[0] in COMPLETES and name.endswith(tuple(COMPLETES.values()))


def stamp_of(path: Path) -> Stamp:
    """Return the size, time of change and inode of a file, which identify its content."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _files_below(run: Path) -> Iterator[str]:
    """Yield the names of the files to store, relative to ``run``."""
    for folder, folders, files in os.walk(run):
        place = Path(folder).relative_to(run)
        top = place == Path()
        folders[:] = [
            n for n in folders if not _TEMPORARY.fullmatch(n) and not (top and n in LEFT_OUT)
        ]
        for name in files:
            if not _TEMPORARY.fullmatch(name) and not (top and name in LEFT_OUT):
                yield (place / name).as_posix()


def complete_files(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """Divide the files in the store into those to fetch and those of incomplete folders."""
    names = {name for name in files if name not in LEFT_OUT}
    complete: list[str] = []
    rest: list[str] = []
    for name in sorted(names):
        top, _, inside = name.partition("/")
        marker = f"{top}/{inside.partition('/')[0]}/{COMPLETES[top]}" if top in COMPLETES else name
        temporary = _TEMPORARY.fullmatch(name.rpartition("/")[2])
        (rest if temporary or marker not in names else complete).append(name)
    return complete, rest
