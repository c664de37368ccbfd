"""Surgery: the narrow network, built from the wide one with smaller, dense layers and no masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.errors import GammaslimError
from job.slimming.graph.layer_rules import layer_rule
from job.slimming.graph.layers import (
    inputs_axis,
    is_depthwise,
    modules_of,
    owner_of,
    weight_rows,
)
from job.slimming.graph.selection import SelectedChannels, unwrap_selection
from job.slimming.graph.spaced import SpacedConvolution, can_be_spaced, line_of
from job.slimming.surgery.clone import clone_module
from job.slimming.surgery.kept_channels import groups_that_stay
from job.slimming.surgery.removal import Modules, replacements
from job.slimming.surgery.scales import has_scaled_rows, scaled_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.slimming.graph.layer_rules import LayerRule
    from job.slimming.planning.layer_channels import AttributeSizes, Kept, LayerChannels, Layers

Tensors = dict[str, torch.Tensor]

# of a MultiheadAttention with separate weights
SEPARATE_SIZES = {"embed_dim": "q_proj_weight", "kdim": "k_proj_weight", "vdim": "v_proj_weight"}


def apply_plan(network: nn.Module, layers: Layers) -> nn.Module:
    """Copy ``network`` with only the channels in ``layers``; the original is not changed.

    Device, dtype, memory format, training mode and requires_grad stay as they are. Raises
    GammaslimError or IndexError for layers that are not this network's.
    """
    modules = modules_of(network)
    replaced = replacements(modules, layers)
    # narrow tensors and layers by id of the wide one, which is not copied
    memo: dict[int, Any] = {id(modules[name]): layer for name, layer in replaced.items()}
    for name, channels in layers.items():
        if name in replaced or not channels.cuts_tensors:
            continue
        holder = _holder(modules, name)
        for attribute, tensor in _cut_tensors(modules, name, channels).items():
            wide = getattr(holder, attribute)
            if tensor is not wide:
                is_parameter = isinstance(wide, nn.Parameter)
                memo[id(wide)] = (
                    nn.Parameter(tensor, wide.requires_grad) if is_parameter else tensor
                )
    for name, channels in layers.items():
        if channels.select:
            _select_inputs(modules[name], channels.select, memo)
        if channels.line is not None and name not in replaced:
            _space_inputs(_holder(modules, name), channels, memo)
    narrow = clone_module(network, memo)
    if layers:
        for name, module in modules_of(network, once=True).items():
            if name not in replaced:
                _set_sizes(module, memo)
    for name, channels in layers.items():
        if channels.out and name in modules and name not in replaced:
            _set_passed_sizes(modules[name], memo, channels.out)
        if channels.sizes:
            _set_attributes(_holder(modules, name), memo, channels.sizes)
        layer: Any = memo[id(modules[name])] if channels.bias else None
        if channels.bias and name not in replaced and layer.bias is None:
            weight = layer.weight
            rows = len(weight_rows(layer))
            layer.bias = nn.Parameter(weight.new_zeros(rows), weight.requires_grad)
    return narrow


def _holder(modules: Modules, name: str) -> nn.Module:
    """Return the module that contains the tensors to cut under ``name``."""
    if name not in modules:  # a parameter or buffer, not a layer
        if owner_of(name) not in modules:
            raise GammaslimError(f"there is no layer {name}")
        return modules[owner_of(name)]
    return unwrap_selection(modules[name])


def _keep_indices(tensor: torch.Tensor, kept: Kept | None, axis: int) -> torch.Tensor:
    """Keep some indices along an axis, in the tensor's memory format; None keeps all."""
    if kept is None:
        return tensor
    index = torch.tensor(kept, dtype=torch.long, device=tensor.device)
    return _in_format_of(tensor, tensor.detach().index_select(axis, index))


def _renumbered(table: torch.Tensor, kept: Kept | None, places: Kept) -> torch.Tensor:
    """Return the entries ``kept`` of a table of indices, as indices of the channels ``places``."""
    rising = torch.tensor(places, dtype=table.dtype, device=table.device)
    return torch.searchsorted(rising, _keep_indices(table, kept, 0)).to(table.dtype)


def _in_format_of(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    if wide.dim() == 4 and wide.is_contiguous(memory_format=torch.channels_last):
        return narrow.contiguous(memory_format=torch.channels_last)
    return narrow


def _cut_tensors(modules: Modules, name: str, channels: LayerChannels) -> Tensors:
    """Return the cut tensors of the layer, parameter or buffer ``name``, by attribute."""
    holder = _holder(modules, name)
    if name not in modules:
        attribute = name.rpartition(".")[2]
        tensor = getattr(holder, attribute)
        if channels.places is not None:
            return {attribute: _renumbered(tensor, channels.out, channels.places)}
        axis = channels.axis
        if axis is None:
            axis = next((axis for axis, size in enumerate(tensor.shape) if size > 1), 0)
        along = inputs_axis(tensor, channels.axis)
        tensor = _keep_indices(tensor, channels.out, axis)
        if along is not None:
            tensor = _keep_indices(tensor, channels.in_, along)
        if channels.scaled:
            tensor = scaled_rows(tensor.detach(), channels, axis).to(tensor.dtype)
        return {attribute: tensor}
    rule = layer_rule(holder)
    if rule is None:
        raise GammaslimError(f"cannot cut a {type(holder).__name__}")
    through = channels.out if channels.select is None else channels.select
    kept = {"out": channels.out, "in": channels.in_, "through": through, "places": channels.places}
    groups = int(getattr(holder, "groups", 1))
    tensors: Tensors = {}
    for attribute, sides in rule.tensors.items():
        tensor = getattr(holder, attribute, None)
        if tensor is None:
            continue
        if groups > 1 and len(sides) > 1:
            tensors[attribute] = _cut_grouped(holder, tensor, *(kept[side] for side in sides))
            continue
        for axis, side in enumerate(sides):
            tensor = _keep_indices(tensor, kept.get(side), axis)
        if channels.scaled and has_scaled_rows(sides):
            tensor = scaled_rows(tensor.detach(), channels).to(tensor.dtype)
        tensors[attribute] = tensor
    return tensors


def _cut_grouped(
    layer: Any, weight: torch.Tensor, kept_rows: Kept | None, kept_columns: Kept | None
) -> torch.Tensor:
    """Cut the weight (O, I / G, …) of a grouped convolution, group by group.

    The weight of a transposed convolution is (I, O / G, …).
    """
    if is_depthwise(layer):
        return _keep_indices(weight, kept_rows, 0)
    groups = layer.groups
    high, wide = len(weight) // groups, weight.shape[1]
    rows = torch.tensor(range(len(weight)) if kept_rows is None else kept_rows)
    columns = torch.tensor(range(wide * groups) if kept_columns is None else kept_columns)
    rows, columns = rows.view(groups, -1), columns.view(groups, -1)
    part = torch.arange(groups)[:, None]
    if (rows // high != part).any() or (columns // wide != part).any():
        raise GammaslimError(f"a cut of {type(layer).__name__} leaves its groups unequal")
    columns = (columns - part * wide).repeat_interleave(rows.shape[1], 0)
    narrow = _keep_indices(weight, tuple(rows.reshape(-1).tolist()), 0)
    columns = columns.reshape(len(narrow), -1, *[1] * (weight.dim() - 2)).to(weight.device)
    return narrow.gather(1, columns.expand(-1, -1, *weight.shape[2:]))


def _set_sizes(wide: Any, memo: Mapping[int, Any]) -> None:
    """Set attributes of a layer's copy, e.g. ``in_channels``, to the sizes of its tensors."""
    rule = layer_rule(wide)
    if isinstance(wide, nn.Embedding | nn.EmbeddingBag) and id(wide) in memo:
        memo[id(wide)].embedding_dim = memo[id(wide)].weight.shape[1]
    if rule is None or id(wide) not in memo:
        return
    layer: Any = unwrap_selection(memo[id(wide)])
    if is_depthwise(wide):
        layer.groups = wide.groups * len(layer.weight) // len(wide.weight)
    for attribute, side in rule.sizes.items():
        size = _size_along(layer, rule, side)
        if size is not None and side != "whole":
            _set_size(layer, attribute, size)
    if isinstance(layer, nn.MultiheadAttention):
        for attribute, own in SEPARATE_SIZES.items():
            if (weight := getattr(layer, own)) is not None:
                setattr(layer, attribute, weight.shape[1])
        layer.head_dim = layer.embed_dim // layer.num_heads


def _set_size(layer: nn.Module, attribute: str, size: int) -> None:
    """Set a number of channels, or the first axis of a shape."""
    value = getattr(layer, attribute)
    setattr(layer, attribute, (size, *value[1:]) if isinstance(value, tuple) else size)


def _set_attributes(wide: nn.Module, memo: Mapping[int, Any], sizes: AttributeSizes) -> None:
    """Set attributes of a module's copy that count channels; raises GammaslimError for others."""
    for attribute, size in sizes:
        value: Any = vars(wide).get(attribute)
        kinds = (int,) if isinstance(size, int) else (tuple, list)
        if type(value) not in kinds:
            raise GammaslimError(f"{type(wide).__name__} has no number of channels {attribute!r}")
        vars(memo[id(wide)])[attribute] = type(value)(size)


def _set_passed_sizes(wide: Any, memo: Mapping[int, Any], kept: Kept) -> None:
    """Set the sizes and groups of a norm's copy to match the channels ``kept`` that pass it."""
    rule, layer = layer_rule(wide), memo[id(wide)]
    for attribute, side in rule.sizes.items() if rule else ():
        if side == "through" and not isinstance(wide, SelectedChannels):
            _set_size(layer, attribute, len(kept))
    if isinstance(wide, nn.GroupNorm):
        layer.num_groups = groups_that_stay(wide.num_groups, wide.num_channels, kept)


def _size_along(layer: nn.Module, rule: LayerRule, side: str) -> int | None:
    """Return the size along ``side`` of the first tensor of a layer that has it, or None."""
    for attribute, sides in rule.tensors.items():
        tensor = getattr(layer, attribute, None)
        if tensor is not None and side in sides:
            axis = sides.index(side)
            groups = getattr(layer, "groups", 1) if axis else 1  # columns are those of one group
            return int(tensor.shape[axis] * groups)
    return None


def _select_inputs(norm: nn.Module, kept: Kept, memo: dict[int, Any]) -> None:
    """Let the copy of a BatchNorm select the channels ``kept`` of its input."""
    if isinstance(norm, SelectedChannels):
        memo[id(norm.indices)] = norm.indices[torch.tensor(kept, device=norm.indices.device)]
        return
    device = next((t.device for t in (*norm.parameters(), *norm.buffers())), None)
    indices = torch.tensor(kept, dtype=torch.long, device=device)
    selected = SelectedChannels(clone_module(norm, memo), indices)
    selected.training = norm.training
    memo[id(norm)] = selected


def _space_inputs(layer: Any, channels: LayerChannels, memo: dict[int, Any]) -> None:
    """Let the copy of a convolution keep the places of the channels that it runs along."""
    if isinstance(layer, SpacedConvolution):
        return  # its indices are cut
    if channels.places is None or channels.line is None or channels.axis is None:
        raise GammaslimError("a convolution across channels has no places")
    if not can_be_spaced(layer, channels.axis):
        raise GammaslimError(f"cannot space the channels of a {type(layer).__name__}")
    copy: Any = clone_module(layer, memo)
    indices = torch.tensor(channels.places, dtype=torch.long, device=layer.weight.device)
    line = line_of(layer, channels.line, channels.axis)
    memo[id(layer)] = SpacedConvolution(copy.weight, copy.bias, indices, line)
    memo[id(layer)].training = layer.training
