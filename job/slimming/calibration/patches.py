"""Patches: the input values that a layer multiplies by its kernel at one output position."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence


def row_count(layer: nn.Module, outputs: torch.Tensor) -> int:
    """Return the number of output positions in ``outputs`` (B, O, …) of a layer."""
    return outputs[..., 0].numel() if isinstance(layer, nn.Linear) else outputs[:, 0].numel()


def sample_positions(
    rows: int, step: int, sizes: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Return every ``step``-th of ``rows`` output positions, as flat indices (N,).

    ``sizes`` are the batch sizes of the batches that are joined. The positions within a batch do
    not depend on how batches are joined. The step is increased if it would otherwise cover only
    some columns of the images.
    """
    each, rest = divmod(rows, sum(sizes))
    if rest:
        sizes, each = (1,), rows
    while step > 1 and math.gcd(step, each) > 1:
        step += 1
    starts = itertools.accumulate(sizes, initial=0)
    return torch.cat([
        torch.arange(start * each, (start + size) * each, step, device=device)
        for start, size in zip(starts, sizes, strict=False)
    ])  # fmt: skip


def values_at(layer: nn.Module, outputs: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return the ``outputs`` (B, O, …) of a layer at flat indices ``where`` (N,), as (N, O)."""
    if isinstance(layer, nn.Linear):
        return outputs.reshape(-1, outputs.shape[-1])[where]
    flat = outputs.flatten(2)
    positions = flat.shape[2]
    return flat[where // positions, :, where % positions]


def pad_inputs(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Pad ``inputs`` (B, C, …) as ``layer`` does."""
    if isinstance(layer, nn.Linear) or not any(layer._reversed_padding_repeated_twice):
        return inputs
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)


def patches_at(
    layer: Any, padded: torch.Tensor, where: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """Return the patches (N, C, K) of padded inputs (B, C, …) at the positions ``where`` (N,).

    Positions are flat indices into output maps of the given ``sizes``. K is the number of elements
    of the kernel, 1 for a linear layer.
    """
    if isinstance(layer, nn.Linear):
        return padded.reshape(-1, padded.shape[-1])[where][:, :, None]
    sample, *places = torch.unravel_index(where, (len(padded), *sizes))
    starts = [place * stride for place, stride in zip(places, layer.stride, strict=True)]
    values, taps = padded.movedim(1, -1), []
    for offsets in itertools.product(*map(range, layer.kernel_size)):
        steps = zip(starts, offsets, layer.dilation, strict=True)
        taps.append(values[(sample, *(start + o * dilation for start, o, dilation in steps))])
    return torch.stack(taps, 2)
