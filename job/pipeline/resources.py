"""Check the resources of a run: cores, batch sizes and disk space."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from job.artifacts.checkpoint import KEPT
from job.console import amount, counted, say
from job.data.loader import default_workers
from job.data.splits import ArraySplit
from job.distributed.cores import available_cores
from job.errors import StorageError, shown
from job.processes import local_world_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from job.artifacts.records import PlannedRound
    from job.config import PruneConfig
    from job.data.dataset import Dataset

TINY = 8  # a last batch of less than an eighth of the others counts as tiny


def check_disk(config: PruneConfig, planned: Sequence[PlannedRound], output: Path) -> None:
    """Raise StorageError unless the disk has space for what the run will write."""
    place = next(p for p in (output, *output.absolute().parents) if p.exists())
    needed, free = space_needed(config, planned), shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"{shown(place)} has {free:,} bytes free, the run needs about {needed:,}: "
            "free some space or choose another --output"
        )
    say(f"disk: the run needs about {amount(needed)}, {amount(free)} is free")


def space_needed(config: PruneConfig, planned: Sequence[PlannedRound]) -> int:
    """Return about how many bytes a run's models, positions and W&B files take at most.

    A position has the network, the best one so far and the optimizer's one or two states; a new
    one is written before the oldest is deleted.
    """
    models = sum(entry.bytes for entry in planned)
    largest = max(entry.bytes for entry in planned)
    states = {"adamw": 2, "sgd": 1}[config.optimizer]
    positions = (KEPT + 1) * (2 + states) * largest
    # W&B copies each model, the recommended one twice
    copies = models + largest if config.wandb_mode != "off" else 0
    return models + positions + copies + 2**22  # 4 MiB for tables and logs


def batch_warnings(batch: int, count: int, processes: int, least: int = 1) -> list[str]:
    """Return warnings about global batches of ``batch`` images out of ``count``."""
    found = []
    if batch % processes:
        low = batch // processes
        near = max(processes, round(batch / processes) * processes)
        found.append(
            f"--batch-size {batch} over {processes} processes gives some {low} and some {low + 1} "
            f"images: use a multiple of {processes}, e.g. {near}"
        )
    last = count % batch
    if last >= least and last and (last < processes or last * TINY < batch):
        sizes = sorted(range(batch // 2 + 1, batch * 2), key=lambda size: abs(size - batch))
        good = (s for s in sizes if s % processes == 0 and (count % s == 0 or count % s * 2 >= s))
        better = f": --batch-size {size} would be better" if (size := next(good, 0)) else ""
        found.append(
            f"the last batch of an epoch has only {last} of {batch} images, yet it takes "
            f"a whole step, with BatchNorm statistics of these alone{better}"
        )
    return found


def core_warnings(config: PruneConfig, data: Dataset, cuda: bool) -> list[str]:
    """Return a warning when this node has too few cores for its processes."""
    processes, cores = local_world_size(), available_cores()
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        cores = min(cores, int(slurm))
    workers = default_workers(processes, cuda) if config.workers is None else config.workers
    if isinstance(data.splits["training"], ArraySplit):
        workers = 0  # the images are in memory
    # a process that waits for its GPU often leaves its core to a loader
    wanted = max(2, workers + (not cuda)) if workers else 1
    if cores >= wanted * processes:
        return []
    loaders = f" with {counted(workers, 'loader process')} each" if workers else ""
    return [
        f"{counted(cores, 'core')} here for {counted(processes, 'training process')}"
        f"{loaders}, {wanted * processes} are recommended: give more "
        "(Slurm: --cpus-per-task, and for srun SRUN_CPUS_PER_TASK), or fewer --workers"
    ]
