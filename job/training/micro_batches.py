"""Parts of a global batch that are trained one after another, and the gradient of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from job.data.task_items import take_samples
from job.processes import rank, world_size

if TYPE_CHECKING:
    from torch import nn


def micro_batches(size: int, accumulate: int) -> int:
    """Return the number of parts of a global batch of ``size`` images; the same on every process.

    The number is at most ``accumulate``, and small enough that each process has at least two images
    in each part: a BatchNorm with one value per channel of an image needs two.
    """
    return max(1, min(accumulate, size // (2 * world_size())))


def part_sizes(size: int, accumulate: int) -> set[int]:
    """Return the numbers of images of this process in the parts of a global batch: one or two."""
    share, parts = len(range(rank(), size, world_size())), micro_batches(size, accumulate)
    return {share // parts, -(-share // parts)}


def split_samples(batch: tuple[Any, Any], parts: int) -> list[Any]:
    """Split a batch of inputs and targets into ``parts``, as ``torch.tensor_split`` does."""
    chunks = torch.arange(len(batch[0])).tensor_split(parts)
    stops = torch.tensor([len(chunk) for chunk in chunks]).cumsum(0).tolist()
    return [
        take_samples(batch, stop - len(chunk), stop)
        for chunk, stop in zip(chunks, stops, strict=True)
    ]


def divide_gradients(network: nn.Module, divisor: torch.Tensor) -> None:
    """Divide the gradient of a global batch, e.g. by its pixels per sample; by 0 it becomes 0.

    Does not wait for the device.
    """
    factor = torch.where(divisor > 0, 1 / divisor, 0.0)
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
