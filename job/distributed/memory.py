"""Memory available to this node, container or Slurm job, and settings of glibc for freed memory."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.distributed.cores import cgroup_folders

if TYPE_CHECKING:
    from collections.abc import Iterator

MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = -3, -1, -2  # options of glibc's mallopt
UNLIMITED = 2**31 - 1  # bytes

# files of a limit, the use, and the statistics with the reclaimable part: cgroup v2, v1
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks: page faults otherwise take half of a CPU step."""
    _set_malloc(MMAP_THRESHOLD, UNLIMITED)
    _set_malloc(TRIM_THRESHOLD, UNLIMITED)
    _set_malloc(TOP_PAD, 256 << 20)


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """Return freed blocks to the system before and after the context, and large ones within it.

    A cut needs more memory than training, in blocks of many sizes. Without this context, glibc
    keeps the freed blocks until they fill the memory.
    """
    _set_malloc(MMAP_THRESHOLD, 16 << 20)
    free_memory()
    try:
        yield
    finally:
        _set_malloc(MMAP_THRESHOLD, UNLIMITED)
        free_memory()


def free_memory() -> None:
    """Return unused memory to the system, including networks in reference cycles."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed blocks to the system."""
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Return the bytes of this process that are in memory; 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def _set_malloc(option: int, value: int) -> None:
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(option, value)


def available_memory() -> int:
    """Return the bytes that can be used without swapping or reaching a limit; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (free,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError):
        return 0
    limits = [free, *(left for folder in cgroup_folders("memory") if (left := _left(folder)))]
    if (slurm := os.environ.get("SLURM_MEM_PER_NODE", "")).isdecimal() and int(slurm):
        limits.append(int(slurm) << 20)
    return max(0, min(limits))


def _left(folder: Path) -> int | None:
    for limit, use, reclaimable in _FILES:
        try:
            most = int((folder / limit).read_text())
            used = int((folder / use).read_text())
            rows = (folder / "memory.stat").read_text().splitlines()
            cached = sum(int(row.split()[1]) for row in rows if row.split()[0] == reclaimable)
        except (OSError, ValueError, IndexError):  # not this version, or "max"
            continue
        return max(1, most - used + cached)
    return None
