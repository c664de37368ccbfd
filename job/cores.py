"""How many processor cores this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

QUOTAS = (  # files of (quota, period) in microseconds: cgroup v2, then v1
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def available_cores() -> int:
    """Cores by affinity (Slurm sets it), or by a container's CPU limit where that is less."""
    cores = len(os.sched_getaffinity(0))
    for files in QUOTAS:
        try:
            quota, period = " ".join(Path(file).read_text() for file in files).split()
            if int(quota) > 0:
                return max(1, min(cores, -(-int(quota) // int(period))))
        except (OSError, ValueError):  # not this version, or "max"
            continue
    return cores
