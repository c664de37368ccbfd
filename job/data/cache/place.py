"""Place of a cache: node-local scratch, the run folder, or shared memory."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.console import amount
from job.distributed.memory import available_memory
from job.errors import StorageError, UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.config import CacheMode

SCRATCH = ("SLURM_TMPDIR", "TMPDIR")  # environment variables that name node-local folders
MEMORY_SHARE = 0.25  # of the available memory that --cache auto takes at most
DISK_SHARE = 0.5  # of the free space that --cache auto takes at most
UNUSED = 30  # days after which a cache that no job has used is deleted
SPARE = 64 << 20  # bytes that a cache leaves free on a disk
OFF_ADVICE = "free some space, choose another --cache-dir, or pass --cache off"


@dataclass(frozen=True)
class CachePlace:
    """Place of a cache: a ``folder``, shared ``memory``, or neither, for a ``reason``."""

    folder: Path | None = None
    memory: bool = False
    reason: str = ""  # why there is no cache

    @property
    def exists(self) -> bool:
        """Whether there is a place."""
        return self.memory or self.folder is not None


def uncached_message(reason: str) -> str:
    """Return the message of a run whose images have no cache, for a ``reason``."""
    return f"cache: none, images are decoded in every epoch: {reason}"


def scratch_folder() -> Path | None:
    """Return the folder for caches in node-local scratch, of this user; None without scratch."""
    for name in SCRATCH:
        value = os.environ.get(name)
        if value and Path(value).is_dir():
            return Path(value) / f"gammaslim-cache-{os.getuid()}"
    return None


def cache_folders(mode: CacheMode, cache_dir: str | None, run: Path) -> Iterator[Path]:
    """Yield the folders in which a finished cache may be found, the preferred one first."""
    if mode in ("off", "ram"):
        return
    if cache_dir:
        yield Path(cache_dir)
        return
    if scratch := scratch_folder():
        yield scratch
    yield run / "cache"


def choose_place(mode: CacheMode, cache_dir: str | None, run: Path, needed: int) -> CachePlace:
    """Choose a place for ``needed`` bytes on this node.

    ``auto`` uses --cache-dir or scratch if the file fills at most half of the free space, else
    memory if it fills at most a quarter, and never the run folder. Raises StorageError if a place
    that the user has chosen has too little space.
    """
    if mode == "off":
        return CachePlace()
    if mode == "ram":
        return _memory(needed)
    scratch = Path(cache_dir) if cache_dir else scratch_folder()
    if mode == "disk":
        folder = scratch or run / "cache"
        if (free := free_space(folder)) < needed + SPARE:
            raise StorageError(
                f"the cache of decoded images needs {amount(needed)}, but {shown(folder)} has "
                f"{amount(free)} free: {OFF_ADVICE}"
            )
        return CachePlace(folder)
    if scratch and needed <= DISK_SHARE * free_space(scratch):
        return CachePlace(scratch)
    if needed <= MEMORY_SHARE * available_memory():
        return CachePlace(memory=True)
    return CachePlace(
        reason=f"the decoded images take {amount(needed)}: --cache disk --cache-dir PATH stores "
        "them on a fast disk"
    )


def _memory(needed: int) -> CachePlace:
    if needed > (free := available_memory()):
        raise StorageError(
            f"--cache ram needs {amount(needed)}, but {amount(free)} of memory is available: "
            "use --cache disk or --cache off"
        )
    return CachePlace(memory=True)


def free_space(folder: Path) -> int:
    """Return the free bytes where ``folder`` is, or would be created; 0 if that is unknown."""
    for place in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            break
    return 0


def mark_used(path: Path) -> None:
    """Set the time at which a job last used the cache at ``path``, if that is allowed."""
    with suppress(OSError):
        os.utime(path)


def remove_unused(folder: Path) -> tuple[int, int]:
    """Delete the caches in ``folder`` that no job has used for UNUSED days; return count and bytes.

    Unfinished files of killed jobs count too. Files of other users that cannot be deleted stay.
    """
    count = size = 0
    for pattern in ("*.images", ".*.tmp"):
        for path in folder.glob(pattern):
            with suppress(OSError):
                status = path.stat()
                if time.time() - status.st_mtime > UNUSED * 24 * 3600:
                    path.unlink()
                    count, size = count + 1, size + status.st_size
    return count, size


def prepare_folder(folder: Path) -> None:
    """Create ``folder``; raises UsageError if another user owns a folder in shared scratch."""
    default = folder.name == f"gammaslim-cache-{os.getuid()}"
    folder.mkdir(mode=0o700 if default else 0o777, parents=True, exist_ok=True)
    if default and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise UsageError(f"{shown(folder)} belongs to another user: choose a --cache-dir")
