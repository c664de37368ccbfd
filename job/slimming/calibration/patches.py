"""Patches: the input values that a layer multiplies by its kernel at one output position."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from job.slimming.graph.layers import CONVOLUTIONS
from job.slimming.graph.trace import Op
from job.slimming.inputs import tensors_in

if TYPE_CHECKING:
    from collections.abc import Sequence

KERNEL_OPS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})


def row_count(layer: nn.Module, outputs: torch.Tensor) -> int:
    """Return the number of output positions in ``outputs`` (B, O, …) of a layer."""
    return outputs[..., 0].numel() if isinstance(layer, nn.Linear) else outputs[:, 0].numel()


def sample_positions(
    rows: int, step: int, sizes: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Return every ``step``-th of ``rows`` output positions, as flat indices (N,).

    ``sizes`` are the batch sizes of the batches that are joined. The positions within a batch do
    not depend on how batches are joined. The step is increased if it has a common divisor with the
    positions of an image, of which it would otherwise sample only some columns.
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
    """Pad ``inputs`` (B, C, …) as ``layer`` does, by its attributes or a custom forward pass."""
    if not is_standard(layer):
        padded = _kernel_op_inputs(layer, inputs)
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

    A custom forward pass may prepare the inputs, e.g. pad them by their size, but must return the
    result of its one convolution. This is tested on zeros.
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
        return _kernel_op_inputs(layer, layer.weight.new_zeros(shape)) is not None
    except Exception:  # user code may raise anything, e.g. for an unsupported size
        return False


class _OpsOnWeight(TorchFunctionMode):
    """Recorder of the ops that compute with the weight of a layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.ops: list[Op] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, results = tuple(tensors_in((args, kwargs))), tuple(tensors_in(result))
        if results and any(tensor is self.weight for tensor in inputs):
            self.ops.append(Op(func.__name__, func, args, kwargs, result, inputs, results))
        return result


def _kernel_op_inputs(layer: Any, inputs: torch.Tensor) -> torch.Tensor | None:
    """Return the padded inputs of the one convolution whose result a layer returns.

    None if the layer uses its weight in any other way.
    """
    with torch.no_grad(), _OpsOnWeight(layer.weight) as recorded:
        outputs = layer.forward(inputs)
    if len(recorded.ops) != 1:
        return None
    op = recorded.ops[0]
    if op.name not in KERNEL_OPS or op.result is not outputs:
        return None
    if op.argument(1, "weight") is not layer.weight or op.argument(2, "bias") is not layer.bias:
        return None
    values: torch.Tensor = op.argument(0, "input")
    if isinstance(layer, nn.Linear):
        return values
    dims, padding = len(layer.kernel_size), op.argument(4, "padding", 0)
    for position, name in ((3, "stride"), (5, "dilation")):
        if _each(op.argument(position, name, 1), dims) != _each(getattr(layer, name), dims):
            return None
    if isinstance(padding, str) or op.argument(6, "groups", 1) != layer.groups:
        return None
    sides = [side for side in reversed(_each(padding, dims)) for _ in range(2)]
    return F.pad(values, sides)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """Return an argument of a convolution as one number for each dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def patches_at(
    layer: Any, padded: torch.Tensor, where: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """Return the patches (N, C, K) of padded inputs (B, C, …) at the positions ``where`` (N,).

    Positions are flat indices into output maps of the given ``sizes``. K is the number of elements
    of the kernel, 1 for a linear layer. In memory the channels of an element are side by side.
    """
    if isinstance(layer, nn.Linear):
        return padded.reshape(-1, padded.shape[-1])[where][:, :, None]
    elements = torch.arange(math.prod(layer.kernel_size), device=where.device)
    offsets = torch.unravel_index(elements, layer.kernel_size)
    sample, *places = torch.unravel_index(where, (len(padded), *sizes))
    index = sample[:, None]
    for dim, length in enumerate(padded.shape[2:]):
        start = places[dim][:, None] * layer.stride[dim]
        index = index * length + start + offsets[dim] * layer.dilation[dim]
    values = padded.movedim(1, -1).reshape(-1, padded.shape[1])
    return values.index_select(0, index.flatten()).view(*index.shape, -1).transpose(1, 2)
