"""Count the processor cores of this process, and configure its OpenMP threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))  # microseconds: cgroup v2, v1
# By default waiting threads spin for milliseconds. On a busy machine they then block the threads
# that they wait for. A thousand spins take some microseconds. On an idle machine, a step then takes
# up to 7 % longer; without any spins, up to a third longer (tests/benchmarks/README.md).
PATIENCE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
_set_here: dict[str, str] = {}


def available_cores() -> int:
    """Return the cores of the CPU affinity, which Slurm sets, or of a lower container limit."""
    return max(1, min(len(os.sched_getaffinity(0)), *_limits()))


def set_thread_variables(processes: int | None = None) -> None:
    """Limit OpenMP to a share of the cores, and limit how long its waiting threads spin.

    Call it before torch is imported, which reads these variables once. The cores are shared by
    ``processes``, by default the processes that the launcher started on this node. Variables set
    by the user are kept.
    """
    started = os.environ.get("LOCAL_WORLD_SIZE", "")
    processes = processes or int(started if started.isdecimal() else 1) or 1
    given = given_environ()
    values = {} if PATIENCE.keys() & given.keys() else dict(PATIENCE)
    if "OMP_NUM_THREADS" not in given:
        values["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))
    _set_here.update(values)
    os.environ.update(values)


def given_environ() -> dict[str, str]:
    """Return the environment without the variables that ``set_thread_variables`` has set."""
    return {name: value for name, value in os.environ.items() if _set_here.get(name) != value}


def _limits() -> Iterator[int]:
    """Yield the CPU limits, in cores rounded up, of this process's cgroups and their parents."""
    for folder in cgroup_folders("cpu"):
        for files in QUOTAS:
            try:
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                if int(quota) > 0:
                    yield -(-int(quota) // int(period))
            except (OSError, ValueError):  # not this version, or "max"
                continue
    yield os.cpu_count() or 1


def cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroups, and of their parents, with ``controller``."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no /proc
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = CGROUPS / controller if controllers else CGROUPS
            here = root / path.lstrip("/")
            yield from (folder for folder in (here, *here.parents) if folder.is_relative_to(root))
