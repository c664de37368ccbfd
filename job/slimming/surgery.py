"""Cut channels for real: dense, smaller layers, no masks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.errors import GammaslimError
from job.slimming.activations import BATCHNORM, CONVOLUTIONS, owner
from job.slimming.select import SelectedChannels

if TYPE_CHECKING:
    from job.slimming.plan import Kept, LayerChannels, Layers

STATISTICS = ("weight", "bias", "running_mean", "running_var")
Tensors = dict[str, torch.Tensor]


def narrowed(network: nn.Module, layers: Layers) -> nn.Module:
    """A copy of ``network`` with only the channels in ``layers``; the input is left untouched.

    Device, dtype, memory format, training mode and requires_grad stay as they are. Raises
    GammaslimError or IndexError for layers that are not this network's.
    """
    cut: dict[str, Tensors] = {name: _tensors(network, name, layers[name]) for name in layers}
    memo: dict[int, object] = {}  # what is cut is not copied first
    for name, tensors in cut.items():
        holder = _holder(network, name)
        for own, tensor in tensors.items():
            old = getattr(holder, own)
            if tensor is old:
                continue
            memo[id(old)] = nn.Parameter(tensor, old.requires_grad) if _is_param(old) else tensor
    narrow = copy.deepcopy(network, memo)
    for name, kept in layers.items():
        _adjust(narrow, name, kept)
    return narrow


def _holder(network: nn.Module, name: str) -> nn.Module:
    """The module that has the tensors which are cut under ``name``."""
    if _bare(network, name):
        return network.get_submodule(owner(name))
    layer = network.get_submodule(name)
    return layer.norm if isinstance(layer, SelectedChannels) else layer


def _bare(network: nn.Module, name: str) -> bool:
    """Whether ``name`` is a parameter or buffer, not a layer."""
    try:
        network.get_submodule(name)
    except AttributeError:
        return True
    return False


def _is_param(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _tensors(network: nn.Module, name: str, kept: LayerChannels) -> Tensors:
    """The tensors of a layer, cut, by their own names."""
    layer = _holder(network, name)
    if _bare(network, name):
        own = name.rpartition(".")[2]
        tensor = getattr(layer, own)
        first = next((axis for axis, size in enumerate(tensor.shape) if size > 1), 0)
        return {own: _select(_select(tensor, kept.out, first), kept.in_, 1)}
    found = {own: getattr(layer, own, None) for own in STATISTICS}
    tensors: Tensors = {own: t for own, t in found.items() if t is not None}
    if isinstance(layer, BATCHNORM):
        side = kept.out if kept.select is None else kept.select
        return {own: _select(tensor, side, 0) for own, tensor in tensors.items()}
    if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        raise GammaslimError(f"cannot cut a {type(layer).__name__}")
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = tensors["weight"]
    if groups > 1 and weight.shape[1] > 1:
        weight = _grouped(layer, weight, kept, groups)
    else:
        weight = _select(weight, kept.out, 0)
        weight = weight if groups > 1 else _select(weight, kept.in_, 1)
    bias = {"bias": _select(tensors["bias"], kept.out, 0)} if "bias" in tensors else {}
    return {"weight": weight, **bias}


def _grouped(
    layer: nn.Module, weight: torch.Tensor, kept: LayerChannels, groups: int
) -> torch.Tensor:
    """A grouped convolution's weight (O, I / G, …): each group's rows with its own columns."""
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    rows = torch.tensor(range(outputs) if kept.out is None else kept.out).view(groups, -1)
    columns = torch.tensor(range(inputs) if kept.in_ is None else kept.in_).view(groups, -1)
    part = torch.arange(groups)[:, None]
    if (rows // (outputs // groups) != part).any() or (columns // (inputs // groups) != part).any():
        raise GammaslimError(f"a cut of {type(layer).__name__} leaves its groups unequal")
    columns = (columns - part * (inputs // groups)).repeat_interleave(rows.shape[1], 0)
    chosen = _select(weight, tuple(rows.reshape(-1).tolist()), 0)
    columns = columns.reshape(len(chosen), -1, *[1] * (weight.dim() - 2)).to(weight.device)
    return chosen.gather(1, columns.expand(-1, -1, *weight.shape[2:]))


def _select(tensor: torch.Tensor, kept: Kept | None, dim: int) -> torch.Tensor:
    if kept is None:
        return tensor
    index = torch.tensor(kept, dtype=torch.long, device=tensor.device)
    narrow = tensor.detach().index_select(dim, index)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        narrow = narrow.contiguous(memory_format=torch.channels_last)
    return narrow


def _adjust(narrow: nn.Module, name: str, kept: LayerChannels) -> None:
    """Make a cut layer's own numbers those of its tensors."""
    if _bare(narrow, name):
        return
    layer = narrow.get_submodule(name)
    if kept.select is not None:
        _choose(narrow, name, layer, kept.select)
    layer = _holder(narrow, name)
    if kept.bias and getattr(layer, "bias", None) is None:
        weight = layer.get_parameter("weight")
        layer.bias = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)
    if isinstance(layer, BATCHNORM):
        sizes = (getattr(layer, own) for own in STATISTICS)
        layer.num_features = next((len(t) for t in sizes if t is not None), layer.num_features)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, CONVOLUTIONS):
        if layer.groups > 1 and layer.weight.shape[1] == 1 and kept.in_ is not None:
            layer.groups = len(kept.in_)
        layer.out_channels = layer.weight.shape[0]
        layer.in_channels = layer.weight.shape[1] * layer.groups


def _choose(narrow: nn.Module, name: str, layer: nn.Module, kept: Kept) -> None:
    """Let a BatchNorm take only the channels ``kept`` of its input."""
    if isinstance(layer, SelectedChannels):
        layer.indices = layer.indices[torch.tensor(kept, device=layer.indices.device)]
        return
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
    selected = SelectedChannels(layer, torch.tensor(kept, dtype=torch.long, device=device))
    selected.training = layer.training
    parent = narrow.get_submodule(owner(name))
    setattr(parent, name.rpartition(".")[2], selected)
