"""Cut channels for real: dense, smaller layers, no masks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from job.errors import GammaslimError
from job.slimming.graph.layers import BATCHNORM, CONVOLUTIONS, LAYER_TYPES, modules_of, owner_of
from job.slimming.graph.selection import SelectedChannels, unwrap_selection
from job.slimming.surgery.clone import clone_module

if TYPE_CHECKING:
    from job.slimming.planning.layer_channels import Kept, LayerChannels, Layers

STATISTICS = ("weight", "bias", "running_mean", "running_var")
Tensors = dict[str, torch.Tensor]
Modules = dict[str, nn.Module]


def apply_plan(network: nn.Module, layers: Layers) -> nn.Module:
    """A copy of ``network`` with only the channels in ``layers``; the input is left untouched.

    Device, dtype, memory format, training mode and requires_grad stay as they are. Raises
    GammaslimError or IndexError for layers that are not this network's.
    """
    modules = modules_of(network)
    memo: dict[int, Any] = {}  # what is cut is not copied first
    select = _Selection()
    for name, kept in layers.items():
        holder = _holder(modules, name)
        for own, tensor in _tensors(modules, name, kept, select).items():
            old = getattr(holder, own)
            if tensor is not old:
                new = nn.Parameter(tensor, old.requires_grad) if _is_param(old) else tensor
                memo[id(old)] = new
    for name, kept in layers.items():
        if kept.select is not None:
            _choose(modules[name], kept.select, memo)
    narrow = clone_module(network, memo)
    if layers:
        for module in modules_of(network, once=True).values():
            _adjust(module, memo)
    for name, kept in layers.items():
        layer: Any = memo[id(modules[name])] if kept.bias else None
        if kept.bias and layer.bias is None:
            weight = layer.weight
            layer.bias = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)
    return narrow


def _holder(modules: Modules, name: str) -> nn.Module:
    """The module that has the tensors which are cut under ``name``."""
    if name not in modules:  # a parameter or buffer, not a layer
        if owner_of(name) not in modules:
            raise GammaslimError(f"there is no layer {name}")
        return modules[owner_of(name)]
    return unwrap_selection(modules[name])


def _is_param(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


class _Selection:
    """Takes channels out of tensors; what many cuts need is made once.

    That is indices that several layers share, and memory for weights cut on one side only: new
    memory for each costs more than the copying does.
    """

    def __init__(self) -> None:
        self.indices: dict[tuple[int, torch.device], tuple[Kept, torch.Tensor]] = {}
        self.scratch = torch.empty(0)

    def __call__(self, tensor: torch.Tensor, kept: Kept | None, dim: int) -> torch.Tensor:
        if kept is None:
            return tensor
        narrow = tensor.detach().index_select(dim, self._index(kept, tensor.device))
        return _as_before(narrow, tensor)

    def both(self, tensor: torch.Tensor, rows: Kept | None, columns: Kept | None) -> torch.Tensor:
        """The ``rows`` and ``columns`` that stay of a weight (O, I, …)."""
        if columns is None:
            return self(tensor, rows, 0)
        half = tensor.detach()
        if rows is not None:
            size = (len(rows), *tensor.shape[1:])
            half = self._memory(math.prod(size), tensor).view(size)
            torch.index_select(tensor.detach(), 0, self._index(rows, tensor.device), out=half)
        chosen = self._index(columns, tensor.device)
        if half[0, 0].numel() > 1:
            return _as_before(half.index_select(1, chosen), tensor)
        # single numbers: faster one row after another
        narrow = half.flatten(1).gather(1, chosen.expand(len(half), -1))
        return _as_before(narrow.view(*narrow.shape, *tensor.shape[2:]), tensor)

    def _index(self, kept: Kept, device: torch.device) -> torch.Tensor:
        key = id(kept), device  # layers that keep the same channels share one tuple
        if key not in self.indices:
            numbers = np.fromiter(kept, np.int64, len(kept))
            self.indices[key] = kept, torch.from_numpy(numbers).to(device)
        return self.indices[key][1]

    def _memory(self, count: int, like: torch.Tensor) -> torch.Tensor:
        scratch = self.scratch
        fits = scratch.dtype == like.dtype and scratch.device == like.device
        if not fits or scratch.numel() < count:
            self.scratch = like.new_empty(count)
        return self.scratch[:count]


def _as_before(narrow: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """In the memory format of ``tensor``."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return narrow.contiguous(memory_format=torch.channels_last)
    return narrow


def _tensors(modules: Modules, name: str, kept: LayerChannels, select: _Selection) -> Tensors:
    """The tensors of a layer, cut, by their own names."""
    layer = _holder(modules, name)
    if name not in modules:
        own = name.rpartition(".")[2]
        tensor = getattr(layer, own)
        first = next((axis for axis, size in enumerate(tensor.shape) if size > 1), 0)
        return {own: select(select(tensor, kept.out, first), kept.in_, 1)}
    found = {own: getattr(layer, own, None) for own in STATISTICS}
    tensors: Tensors = {own: t for own, t in found.items() if t is not None}
    if isinstance(layer, BATCHNORM):
        side = kept.out if kept.select is None else kept.select
        return {own: select(tensor, side, 0) for own, tensor in tensors.items()}
    if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        raise GammaslimError(f"cannot cut a {type(layer).__name__}")
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = tensors["weight"]
    if groups > 1 and weight.shape[1] > 1:
        weight = _grouped(layer, weight, kept, select)
    else:
        weight = select.both(weight, kept.out, None if groups > 1 else kept.in_)
    bias = {"bias": select(tensors["bias"], kept.out, 0)} if "bias" in tensors else {}
    return {"weight": weight, **bias}


def _grouped(
    layer: nn.Module, weight: torch.Tensor, kept: LayerChannels, select: _Selection
) -> torch.Tensor:
    """A grouped convolution's weight (O, I / G, …): each group's rows with its own columns."""
    groups = int(layer.groups)  # type: ignore[arg-type]
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    rows = torch.tensor(range(outputs) if kept.out is None else kept.out).view(groups, -1)
    columns = torch.tensor(range(inputs) if kept.in_ is None else kept.in_).view(groups, -1)
    part = torch.arange(groups)[:, None]
    if (rows // (outputs // groups) != part).any() or (columns // (inputs // groups) != part).any():
        raise GammaslimError(f"a cut of {type(layer).__name__} leaves its groups unequal")
    columns = (columns - part * (inputs // groups)).repeat_interleave(rows.shape[1], 0)
    chosen = select(weight, tuple(rows.reshape(-1).tolist()), 0)
    columns = columns.reshape(len(chosen), -1, *[1] * (weight.dim() - 2)).to(weight.device)
    return chosen.gather(1, columns.expand(-1, -1, *weight.shape[2:]))


def _adjust(wide: Any, memo: dict[int, Any]) -> None:
    """Make the numbers of a layer's copy those of its tensors."""
    if not isinstance(wide, LAYER_TYPES) or id(wide) not in memo:
        return
    layer: Any = unwrap_selection(memo[id(wide)])
    if isinstance(wide, BATCHNORM):
        sizes = (getattr(layer, own) for own in STATISTICS)
        layer.num_features = next((len(t) for t in sizes if t is not None), layer.num_features)
    elif isinstance(wide, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    else:
        if wide.groups > 1 and wide.weight.shape[1] == 1:  # depthwise
            layer.groups = wide.groups * len(layer.weight) // len(wide.weight)
        layer.out_channels = layer.weight.shape[0]
        layer.in_channels = layer.weight.shape[1] * layer.groups


def _choose(norm: nn.Module, kept: Kept, memo: dict[int, Any]) -> None:
    """Let a BatchNorm's copy take only the channels ``kept`` of its input, by whatever name."""
    if isinstance(norm, SelectedChannels):
        chosen = torch.tensor(kept, device=norm.indices.device)
        memo[id(norm.indices)] = norm.indices[chosen]
        return
    device = next((t.device for t in (*norm.parameters(), *norm.buffers())), None)
    indices = torch.tensor(kept, dtype=torch.long, device=device)
    selected = SelectedChannels(clone_module(norm, memo), indices)
    selected.training = norm.training
    memo[id(norm)] = selected
