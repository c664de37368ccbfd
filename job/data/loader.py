"""Batches of one rank: its rows of each global batch, decoded and augmented."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from job.console import warn
from job.data.dataset import UNLABELLED, ArraySplit, Split
from job.data.sample_order import Draw, epoch_table
from job.data.transforms import center_arrays, small_arrays
from job.distributed.cores import available_cores
from job.distributed.signals import end_with_parent, ignore_requests
from job.errors import DataError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from job.data.transforms import Preprocessing

Batch = tuple[torch.Tensor, torch.Tensor]  # images (B, H, W, 3) uint8, labels (B,) int64
Failure = DataError | StorageError
FAILURES = (DataError, StorageError)


@dataclass(frozen=True)
class TrainingImages:
    """Augmented images by table row; what the loader's workers see."""

    split: Split
    preprocessing: Preprocessing

    def __getitems__(self, draws: list[Draw]) -> Batch | Incomplete | Failure:
        """One rank's part of a global batch, possibly empty; an error travels as a value."""
        size, whole = self.preprocessing.size, not self.preprocessing.resizing.side
        if self.preprocessing.preset == "small" and whole and isinstance(self.split, ArraySplit):
            images = small_arrays(self.split.images, draws, size)
            return _batch(images, self.split, [d.index for d in draws], size)
        reader = Reader(self.split)
        try:
            crops = [self.preprocessing.train(reader.read(d.index), d) for d in draws]
        except FAILURES as error:  # raised here, a worker's traceback would become its message
            return error
        arrays = [np.asarray(crop) for crop in crops]
        return reader.told(_batch(arrays, self.split, [d.index for d in draws], size))


@dataclass(frozen=True)
class EvaluationImages:
    """Images as evaluation sees them, by index."""

    split: Split
    preprocessing: Preprocessing
    leave_out: bool = False  # what cannot be read any more, by the label -1

    def __getitems__(self, indices: list[int]) -> Batch | Incomplete | Failure:
        """The images at ``indices``."""
        size = self.preprocessing.size
        if not self.preprocessing.resizing.side and isinstance(self.split, ArraySplit):
            images = center_arrays(self.split.images, indices, size)
            return _batch(images, self.split, indices, size)
        reader = Reader(self.split)
        try:
            crops = [self.preprocessing.evaluate(reader.read(i)) for i in indices]
        except FAILURES as error:
            return error
        batch = _batch([np.asarray(crop) for crop in crops], self.split, indices, size)
        if self.leave_out and reader.failed:
            batch[1][[index in reader.failed for index in indices]] = UNLABELLED
        return reader.told(batch)


class Reader:
    """Reads a batch's images; in a lenient split another of the class stands in for one that fails.

    Which one depends on nothing but the split, so every rank and every attempt takes the same.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.failed: dict[int, str] = {}  # images that could not be read, and why

    def read(self, index: int) -> Image.Image:
        """Image ``index``, or the next of its class that can be read.

        Raises DataError where there is none or the split is not lenient, and StorageError.
        """
        try:
            return self.split.image(index)
        except DataError as error:
            if not self.split.lenient:
                raise
            self.failed[index] = str(error)
            for other in self._others(index):
                try:
                    return self.split.image(other)
                except DataError:
                    continue
            raise

    def _others(self, index: int) -> list[int]:
        labels = self.split.labels
        same = np.flatnonzero(labels == labels[index])
        place = int(np.searchsorted(same, index))
        return [*same[place + 1 :].tolist(), *same[:place].tolist()]

    def told(self, batch: Batch) -> Batch | Incomplete:
        """``batch``, with what is to be said of it."""
        return Incomplete(batch, tuple(self.failed.values())) if self.failed else batch


class Incomplete(NamedTuple):
    """A batch in which other images stand in for some that cannot be read; ``why`` says which."""

    batch: Batch
    why: tuple[str, ...]


def _batch(images: Any, split: Split, indices: list[int], size: int) -> Batch:
    stacked = np.asarray(images, np.uint8)
    if stacked.ndim == 3:
        stacked = np.repeat(stacked[..., None], 3, axis=3)
    stacked = np.ascontiguousarray(stacked.reshape(len(indices), size, size, 3))
    return torch.from_numpy(stacked), torch.from_numpy(split.labels[indices])


class GlobalBatches:
    """Batch sampler: this rank's rows of every global batch of the epoch set by ``set_epoch``.

    Rank r of W takes rows r, r + W, … of a global batch, so that shares differ by at most one
    and every sample is taken once, the last short batch included; of less than ``least`` samples it
    joins the one before.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int, world: int, least: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.batches = max(1, -(-count // batch_size) - (0 < count % batch_size < least))
        self.rank, self.world = rank, world
        self.round, self.epoch, self.first = 0, 0, 0

    def set_epoch(self, round_index: int, epoch: int, first: int = 0) -> None:
        """Choose the table that the next pass follows, and the batch that it begins with."""
        self.round, self.epoch, self.first = round_index, epoch, first

    def __len__(self) -> int:
        return self.batches

    def sizes(self) -> list[int]:
        """Samples in each global batch."""
        last = self.count - (self.batches - 1) * self.batch_size
        return [self.batch_size] * (self.batches - 1) + [last]

    def __iter__(self) -> Iterator[list[Draw]]:
        table = epoch_table(self.count, self.seed, self.round, self.epoch)
        sizes = self.sizes()
        for number in range(self.first, self.batches):
            start = number * self.batch_size
            stop = start + sizes[number]
            yield table.rows(range(start + self.rank, stop, self.world))


class RankShare:
    """Batch sampler for evaluation: images r, r + W, … of rank r, each exactly once."""

    def __init__(self, count: int, batch_size: int, rank: int, world: int) -> None:
        self.indices, self.batch_size = range(rank, count, world), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])


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
