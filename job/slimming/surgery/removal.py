"""Surgery on layers without inputs or outputs, which are replaced by constant layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.errors import GammaslimError
from job.slimming.graph.layer_rules import is_layer
from job.slimming.graph.layers import BATCHNORM
from job.slimming.graph.removed_layers import ConstantOutput, NoOutput, geometry_of
from job.slimming.graph.selection import SelectedChannels

if TYPE_CHECKING:
    from job.slimming.planning.layer_channels import LayerChannels, Layers

Modules = Mapping[str, nn.Module]


def replacements(modules: Modules, layers: Layers) -> dict[str, nn.Module]:
    """Return the replacements of layers without inputs or outputs, and of folded BatchNorms."""
    replaced: dict[str, nn.Module] = {}
    for name, channels in layers.items():
        module = modules.get(name)
        if module is None:
            continue
        if channels.select == () or (channels.out == () and not isinstance(module, BATCHNORM)):
            is_selection = channels.select == ()
            replaced[name] = NoOutput(() if is_selection else geometry_of(module))
        elif channels.out == ():
            replaced[name] = nn.Identity()  # of no channels
        elif channels.in_ == ():
            replaced[name] = _constant(modules, name, channels)
        if name in replaced:
            replaced[name].training = module.training
    norms = {channels.norm for channels in layers.values() if channels.is_constant}
    for norm in norms & modules.keys():
        replaced[str(norm)] = nn.Identity()
        replaced[str(norm)].training = modules[str(norm)].training
    return replaced


def _constant(modules: Modules, name: str, channels: LayerChannels) -> ConstantOutput:
    layer: Any = modules[name]
    if isinstance(layer, ConstantOutput) or not is_layer(layer):
        raise GammaslimError(f"cannot remove the inputs of a {type(layer).__name__}")
    weight = layer.weight
    bias = constant_of(modules, name, channels).to(weight)
    return ConstantOutput(geometry_of(layer), nn.Parameter(bias, weight.requires_grad))


def constant_of(
    modules: Modules, name: str, channels: LayerChannels, added: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Return the outputs (O,) of the layer ``name`` without inputs, in float64 on the CPU.

    They are its bias plus ``added`` (O,), normalised by the BatchNorm that is folded into it.
    """
    layer: Any = modules[name]
    rows = _rows(channels, len(layer.weight))
    constant: torch.Tensor = torch.zeros(len(rows), dtype=torch.float64) + added
    if layer.bias is not None:
        constant = constant + _double(layer.bias)[rows]
    if channels.norm is None:
        return constant
    norm: Any = modules[channels.norm]
    if isinstance(norm, SelectedChannels) or not isinstance(norm, BATCHNORM):
        raise GammaslimError(f"cannot fold a {type(norm).__name__} into {name}")
    deviation = (_double(norm.running_var)[rows] + norm.eps).sqrt()
    normalised: torch.Tensor = (constant - _double(norm.running_mean)[rows]) / deviation
    if norm.weight is not None:
        normalised = normalised * _double(norm.weight)[rows] + _double(norm.bias)[rows]
    return normalised


def _rows(channels: LayerChannels, count: int) -> list[int]:
    return list(range(count)) if channels.out is None else list(channels.out)


def _double(tensor: Any) -> torch.Tensor:
    double: torch.Tensor = tensor.detach().cpu().double()
    return double


def set_exact_constants(copy: nn.Module, wide: nn.Module, layers: Layers) -> None:
    """Set the constants of ``copy``, a narrow network in higher precision, without rounding.

    Raises GammaslimError if the constants of ``copy`` are not those of ``wide``, rounded.
    """
    modules = dict(wide.named_modules(remove_duplicate=False))
    for name, channels in layers.items():
        layer = modules.get(name)
        if layer is None or not channels.is_constant:
            continue
        bias = copy.get_submodule(name).get_parameter("bias")
        exact = constant_of(modules, name, channels)
        rounded = exact.to(layer.get_parameter("weight").dtype).to(bias)
        if not torch.equal(rounded, bias):
            raise GammaslimError(f"the constant of the removed inputs of {name} is wrong")
        with torch.no_grad():
            bias.copy_(exact)
