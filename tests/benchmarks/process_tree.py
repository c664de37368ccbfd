"""Memory of a command and all its processes, from /proc: shared pages count once (PSS)."""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.2  # seconds between two looks


@dataclass(frozen=True)
class Usage:
    """What a command took: bytes of all processes, and of the largest one, at their peaks."""

    peak: int
    largest: int
    seconds: float
    code: int
    samples: tuple[tuple[float, int], ...]  # seconds since the start, bytes of all processes

    def at(self, second: float) -> int:
        """Bytes of all processes at ``second``."""
        return min(self.samples, key=lambda sample: abs(sample[0] - second))[1]


def process_tree(pid: int) -> list[int]:
    """The process and all that descend from it."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            children[int(parent)].append(int(entry.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found


def proportional_memory(pid: int) -> int:
    """Bytes of a process, pages that it shares with n others counted as 1/n; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def measure(command: Sequence[str], env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, and sample the memory of its processes."""
    began = time.perf_counter()
    samples, largest = [], 0
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            each = [proportional_memory(pid) for pid in process_tree(process.pid)]
            samples.append((time.perf_counter() - began, sum(each)))
            largest = max(largest, *each)
            time.sleep(INTERVAL)
    peak = max(size for _, size in samples)
    seconds = time.perf_counter() - began
    return Usage(peak, largest, seconds, process.returncode, tuple(samples))
