"""The DataLoader of one rank, its worker processes, and the batches that come from it."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from job.console import warn
from job.data.batches import FAILURES, Batch, Incomplete
from job.data.splits import ArraySplit
from job.distributed.cores import available_cores
from job.distributed.signals import end_with_parent, ignore_requests

if TYPE_CHECKING:
    from collections.abc import Iterator


def build_loader(images: Any, sampler: Any, *, workers: int, pin: bool) -> DataLoader[Any]:
    """A DataLoader over ``images``; arrays in memory need no workers and get none."""
    workers = 0 if isinstance(images.split, ArraySplit) else workers
    return DataLoader(
        images,
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=prepare_worker,
        prefetch_factor=4 if workers else None,
        multiprocessing_context=_worker_server() if workers else None,
    )


def _worker_server() -> Any:
    """Where workers are forked from, see job.data.worker."""
    quiet = "ignore:resource_tracker"  # it would report the semaphores of a job that was killed
    if quiet not in sys.warnoptions:
        sys.warnoptions.append(quiet)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["job.data.worker"])
    return context


def prepare_worker(_worker: int = 0) -> None:
    """For the server of loader processes, and for each of them: it outlives requests, not the job.

    Launchers signal the whole process group, and a dead worker would kill the save.
    """
    ignore_requests()
    end_with_parent(signal.SIGKILL)
    sys.excepthook = report_uncaught


def report_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What multiprocessing's thread that hands tensors out reports; not that the job has left."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def iterate_batches(batches: DataLoader[Any]) -> Iterator[Batch]:
    """The loader's batches; an error that came in place of one is raised.

    Images that --on-bad-image skip leaves out only now are named once by each process.
    """
    for batch in batches:
        if isinstance(batch, FAILURES):
            raise batch
        if isinstance(batch, Incomplete):
            for why in sorted(set(batch.why) - _named):
                warn(
                    f"{why}; it is left out from now on, another image of its class takes its place"
                )
            _named.update(batch.why)
            batch = batch.batch
        yield batch


_named: set[str] = set()  # what has been said of images


def default_workers(local_world: int, cuda: bool) -> int:
    """Loader processes for each rank: a core stays with the training process on a CPU."""
    cores = available_cores() // max(1, local_world)
    return max(1, min(8, cores if cuda else cores - 1))


def _as_is(batch: Any) -> Any:
    return batch
