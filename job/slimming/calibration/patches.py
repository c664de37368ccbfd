"""Patches: the input values that a layer multiplies by its kernel at one output position."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from job.slimming.graph.layers import CONVOLUTIONS

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
    """Pad ``inputs`` (B, C, …) as ``layer`` does, by its attributes or by code of its own."""
    if not is_standard(layer):
        padded = _inputs_of_its_op(layer, inputs)
        assert padded is not None  # see has_patches
        return padded
    if isinstance(layer, nn.Linear) or not any(layer._reversed_padding_repeated_twice):
        return inputs
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)


def is_standard(layer: Any) -> bool:
    """Return whether a convolution or linear layer runs the forward pass of torch.nn."""
    if "forward" in vars(layer):
        return False
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    kind: Any = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
    standard = type(layer).forward is kind.forward
    return standard and type(layer)._conv_forward is kind._conv_forward


def has_patches(layer: Any) -> bool:
    """Return whether the outputs of a layer are its kernel times patches of its inputs.

    A forward pass of its own may prepare the inputs, e.g. pad them by their size; what its one
    convolution returns must be its output. This is tried on zeros.
    """
    if is_standard(layer):
        return True
    if isinstance(layer, nn.Linear):
        shape = [1, layer.in_features]
    else:
        reach = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        sides = [2 * kernel * dilation + stride for kernel, dilation, stride in reach]
        shape = [1, layer.in_channels, *sides]
    try:
        return _inputs_of_its_op(layer, layer.weight.new_zeros(shape)) is not None
    except Exception:  # whatever a layer raises: it may take some sizes only
        return False


class _Ops(TorchFunctionMode):
    """The calls of ops that read the weight of a layer: op, arguments and result."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.calls: list[tuple[Any, inspect.BoundArguments, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(value is self.weight for value in (*args, *(kwargs or {}).values())):
            bound = _CONVOLUTION if func in _FUNCTIONS else _ANY
            self.calls.append((func, bound.bind(*args, **(kwargs or {})), result))
        return result


def _convolution(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: Any = 1,
) -> None:  # fmt: skip
    """The arguments of torch's convolutions, and the first of them those of its linear function."""


_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_CONVOLUTION = inspect.signature(_convolution)
_ANY = inspect.signature(lambda *args, **kwargs: None)


def _inputs_of_its_op(layer: Any, inputs: torch.Tensor) -> torch.Tensor | None:
    """Return the padded inputs of the one convolution that a layer returns the result of.

    None for a layer that does anything else with its weight.
    """
    with torch.no_grad(), _Ops(layer.weight) as ops:
        outputs = layer.forward(inputs)
    if len(ops.calls) != 1:
        return None
    func, bound, result = ops.calls[0]
    if func not in _FUNCTIONS or result is not outputs:
        return None
    bound.apply_defaults()
    given = bound.arguments
    if given["weight"] is not layer.weight or given["bias"] is not layer.bias:
        return None
    if isinstance(layer, nn.Linear):
        return given["input"]  # type: ignore[no-any-return]
    dims = len(layer.kernel_size)
    for name in ("stride", "dilation"):
        if _each(given[name], dims) != _each(getattr(layer, name), dims):
            return None
    if isinstance(given["padding"], str) or given["groups"] != layer.groups:
        return None
    sides = [side for side in reversed(_each(given["padding"], dims)) for _ in range(2)]
    return F.pad(given["input"], sides)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """An argument of a convolution as one number for each dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


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
