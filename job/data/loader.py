"""The batches of one rank, loaded by processes or threads, or by this process."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from job.console import warn
from job.data.batches import FAILURES, IncompleteBatch
from job.data.cache.cached_split import CachedSplit
from job.data.device_batches import move_batches
from job.data.loader_threads import batches_of_threads
from job.data.splits import ArraySplit
from job.data.task_items import TaskItems
from job.distributed.cores import available_cores
from job.distributed.signals import end_with_parent, ignore_requests
from job.errors import ConfigError, UsageError, reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.data.batches import AugmentedImages, PlainImages

CPU = torch.device("cpu")
MAX_WORKERS = 8  # loader processes of a rank, unless --workers asks for more
SOCKET_PATH = 107  # bytes, on Linux
SOCKET_NAME = len("/pymp-abcdefgh/listener-abcdefgh")
SHORT_FOLDERS = ("/tmp", "/dev/shm", "/var/tmp")
JOB, SERVER = "_GAMMASLIM_JOB", "_GAMMASLIM_SERVER"  # ids of the processes that start others
_reported: set[str] = set()  # reasons that this process has reported


class Loader:
    """The batches of one rank; ``len`` is their number in an epoch.

    Images in memory are loaded by this process, and cached images by ``workers`` threads of it if
    they stay on the CPU. Other images, and those for a GPU, whose steps are launched by this
    process without a pause, are loaded by ``workers`` processes.
    """

    def __init__(
        self,
        images: AugmentedImages | PlainImages | TaskItems,
        sampler: Any,
        *,
        workers: int,
        pin: bool,
    ) -> None:
        workers = 0 if isinstance(images.split, ArraySplit) else workers
        self.images, self.sampler = images, sampler
        self.threads = 0 if pin else workers
        dataset: Any = images  # a DataLoader with a batch sampler calls only __getitems__
        self.processes: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=pin and not isinstance(images, TaskItems),  # it turns tuples into lists
            persistent_workers=workers > 0,
            worker_init_fn=prepare_worker,
            prefetch_factor=4 if workers else None,
            multiprocessing_context=_worker_server() if workers else None,
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        split = self.images.split
        if self.threads and isinstance(split, CachedSplit) and split.cache.stored:
            return batches_of_threads(self.images, self.sampler, self.threads)
        try:
            return iter(self.processes)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise UsageError(
                f"--workers {self.processes.num_workers} needs data that can be pickled: "
                f"{reason(error)}; define its classes and functions at the top level of a module, "
                "or use --workers 0"
            ) from error


def iterate_batches(batches: Loader, device: torch.device = CPU) -> Iterator[Any]:
    """Yield the batches of a loader on ``device``; raise an error that a loader process returned.

    Each process warns once about every image that --on-bad-image skip replaces.
    """
    return move_batches(_checked(batches), device)


def _checked(batches: Loader) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, FAILURES):
            raise batch
        if isinstance(batch, IncompleteBatch):
            for reason in sorted(set(batch.reasons) - _reported):
                warn(f"{reason}; from now on another image of its class replaces it")
            _reported.update(batch.reasons)
            batch = batch.batch
        yield batch


def default_workers(local_world_size: int, cuda: bool) -> int:
    """Return the number of loader processes per rank; on a CPU, training keeps one core."""
    cores = available_cores() // max(1, local_world_size)
    return max(1, min(MAX_WORKERS, cores if cuda else cores - 1))


def prepare_worker(_worker: int = 0) -> None:
    """Make a loader process, or its server, ignore stop requests and end with the job.

    Launchers signal the whole process group; a dead loader process would make the save fail. The
    server imports torch before; if the job has ended meanwhile, it ends at once.
    """
    ignore_requests()
    server = os.environ.get(SERVER)
    parent = server or os.environ.get(JOB)
    os.environ.setdefault(SERVER, str(os.getpid()))  # of the processes that it forks
    end_with_parent(signal.SIGKILL, int(parent) if parent else None)
    sys.excepthook = report_uncaught


def report_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Report an uncaught exception, unless the job closed a connection.

    The multiprocessing thread that sends tensors raises ConnectionError or EOFError when the job
    ends first.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _worker_server() -> Any:
    """Return the context whose server forks the loader processes, see job.data.worker."""
    ignored = "ignore:resource_tracker"  # it warns about the semaphores of killed jobs
    if ignored not in sys.warnoptions:
        sys.warnoptions.append(ignored)
    _shorten_socket_paths()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["job.data.worker"])
    os.environ[JOB] = str(os.getpid())
    return context


def _shorten_socket_paths() -> None:
    """Keep multiprocessing's sockets in a short folder if TMPDIR is long; raises ConfigError.

    The path of a socket has 107 bytes at most, of which multiprocessing takes SOCKET_NAME.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) + SOCKET_NAME <= SOCKET_PATH:
        return
    short = next((name for name in SHORT_FOLDERS if os.access(name, os.W_OK | os.X_OK)), None)
    if short is None:
        raise ConfigError(
            f"TMPDIR has {len(os.fsencode(folder))} characters, and sockets of loader processes "
            f"there take {SOCKET_PATH - SOCKET_NAME} at most: set a shorter TMPDIR, or --workers 0"
        )
    tempfile.tempdir = short
    try:
        multiprocessing.util.get_temp_dir()  # made once, and passed on to the loader processes
    finally:
        tempfile.tempdir = folder


def _as_is(batch: Any) -> Any:
    return batch
