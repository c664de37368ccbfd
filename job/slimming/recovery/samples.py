"""Calibration samples of all processes: numbered, drawn in an order, and augmented."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.data.sample_order import stable_order
from job.distributed.collectives import total
from job.processes import rank, world_size
from job.slimming.calibration.batch import inputs_of
from job.slimming.calibration.moments import GOLDEN_RATIO
from job.slimming.inputs import (
    batch_signature,
    concatenate,
    map_tensors,
    sample_count,
    tensors_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.inputs import Example

Order = np.ndarray[Any, np.dtype[np.int64]]
MIN_SIDE = 16  # pixels; smaller inputs are not augmented
MAX_COLOURS = 4  # inputs with more channels are not images
SHIFT = 8  # images are shifted by up to 1 / SHIFT of their side
HELD_OUT = 10  # about one in HELD_OUT samples is held out
MAX_INPUTS = 64 * 3 * 64**2  # input values of one pass, whose activations must fit into memory
MIN_CHUNK = 8  # samples
STREAM = "recovery"  # name of the stream of random numbers


@dataclass(frozen=True)
class Share:
    """Samples of this process out of some samples: their numbers, and their inputs."""

    numbers: Order
    inputs: Example


class Samples:
    """Calibration samples of this process, numbered over all processes.

    The first samples of all processes are numbered first, then the second ones, and so on: numbers
    do not depend on how many processes share the images. A batch whose samples cannot be separated,
    e.g. a list of images of several sizes, is one sample.

    ``held_out`` are the numbers of the held-out samples, evenly spread, so that images in the order
    of their classes have some of each. ``learned`` are the others.
    """

    def __init__(self, batches: Iterable[CalibrationBatch], device: torch.device) -> None:
        self.parts: list[Example] = []
        self.rows: list[tuple[int, int | None]] = []
        for part, batch in enumerate(batches):
            inputs = inputs_of(batch)
            self.parts.append(inputs)
            splits = type(batch_signature(inputs)) is not object
            count = sample_count(inputs) if splits else 1
            self.rows += [(part, row if splits else None) for row in range(count)]
        counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
        counts[rank()] = len(self.rows)
        held = total(counts).tolist()
        turns = [(turn, owner) for owner, n in enumerate(held) for turn in range(n)]
        mine = [owner == rank() for _, owner in sorted(turns)]
        self.numbers = np.flatnonzero(mine)  # of this process's samples
        self.count = len(turns)
        spread = np.arange(self.count) * GOLDEN_RATIO % 2**32 < 2**32 // HELD_OUT
        self.held_out, self.learned = np.flatnonzero(spread), np.flatnonzero(~spread)

    def order(self, epoch: int, seed: int) -> Order:
        """Return the order (N,) of the training samples in an epoch."""
        order = stable_order(len(self.learned), seed, stream=STREAM, epoch=epoch)
        numbers: Order = self.learned[order]
        return numbers

    def shares(self, numbers: Order, most: int) -> Iterator[Share]:
        """Yield the samples of this process among ``numbers``, up to ``most`` at a time."""
        local = np.searchsorted(self.numbers, numbers)
        local = np.minimum(local, max(0, len(self.numbers) - 1))
        mine = self.numbers[local] == numbers if len(self.numbers) else np.zeros(len(numbers), bool)
        alike: dict[object, list[tuple[int, Example]]] = defaultdict(list)
        for number, index in zip(numbers[mine].tolist(), local[mine].tolist(), strict=True):
            sample = self._sample(index)
            alike[batch_signature(sample)].append((number, sample))
        for samples in alike.values():
            for start in range(0, len(samples), most):
                chunk = samples[start : start + most]
                inputs = concatenate([sample for _, sample in chunk])
                yield Share(np.array([number for number, _ in chunk]), inputs)

    def _sample(self, index: int) -> Any:
        part, row = self.rows[index]
        if row is None:
            return self.parts[part]
        return map_tensors(self.parts[part], lambda tensor: tensor[row : row + 1])


def augmented(share: Share, count: int, epoch: int, seed: int) -> Example:
    """Return the inputs of ``share``, shifted and flipped if they are images (B, C, H, W).

    Images are shifted by up to an eighth of their side, with reflected borders. Random numbers are
    drawn for all ``count`` samples of an epoch.
    """
    inputs = share.inputs
    if not _are_images(inputs):
        return inputs
    assert isinstance(inputs, torch.Tensor)
    draws = [_uniform(count, seed, kind, epoch)[share.numbers] for kind in ("down", "right")]
    flips = _uniform(count, seed, "flip", epoch)[share.numbers] < 0.5
    rows, columns = (
        _shifted(size, draw) for size, draw in zip(inputs.shape[2:], draws, strict=True)
    )
    columns[flips] = columns[flips, ::-1]
    device = inputs.device
    samples = torch.arange(len(inputs), device=device)[:, None, None]
    down = torch.from_numpy(rows).to(device)[:, :, None]
    right = torch.from_numpy(columns.copy()).to(device)[:, None, :]
    return inputs[samples, :, down, right].permute(0, 3, 1, 2).contiguous()


def _are_images(inputs: Example) -> bool:
    return (
        isinstance(inputs, torch.Tensor)
        and inputs.is_floating_point()
        and inputs.dim() == 4
        and inputs.shape[1] <= MAX_COLOURS
        and min(inputs.shape[2:]) >= MIN_SIDE
    )


def _uniform(count: int, seed: int, kind: str, epoch: int) -> Any:
    """Draw a number in [0, 1) for each of ``count`` samples: its relative rank in an order."""
    order = stable_order(count, seed, stream=f"{STREAM} {kind}", epoch=epoch)
    ranks = np.empty(count)
    ranks[order] = np.arange(count)
    return ranks / count


def _shifted(size: int, draw: Any) -> Order:
    """Return indices (B, size) that shift a side by ``draw`` (B,), with reflected ends."""
    most = size // SHIFT
    shifts = np.floor(draw * (2 * most + 1)).astype(np.int64) - most
    indices = np.abs(np.arange(size) + shifts[:, None])
    reflected: Order = (size - 1) - np.abs((size - 1) - indices)
    return reflected


def chunk_size(samples: Samples) -> int:
    """Return how many samples run in one pass: ``MAX_INPUTS`` values, or ``MIN_CHUNK`` samples."""
    sizes = [
        sum(tensor.numel() for tensor in tensors_in(part)) // max(1, sample_count(part))
        for part in samples.parts
    ]
    return max(MIN_CHUNK, MAX_INPUTS // max(1, *sizes, 1))
