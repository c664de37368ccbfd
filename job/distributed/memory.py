"""The memory that this node, container or Slurm job has left."""

from __future__ import annotations

import os
from pathlib import Path

from job.distributed.cores import cgroup_folders

# files of a limit, the use, and the statistics with the reclaimable part: cgroup v2, v1
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


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
