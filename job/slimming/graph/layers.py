"""Modules and tensors of a network by name, and the types of layers that hold channels."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
INPUT_WEIGHTS = ("weight_ih_l0", "weight_ih_l0_reverse")  # of a recurrent layer
FEATURES_LAST = (nn.Linear, nn.RNNBase)  # layers whose inputs are along the last axis
SUMMING = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)  # layers that sum over channels
INSTANCENORM = nn.modules.instancenorm._InstanceNorm
NORMS = (INSTANCENORM, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # other than BatchNorm
BATCHNORM = nn.modules.batchnorm._BatchNorm

# modules by id of a network and whether each is named once, within ``fixed_modules``
_FIXED: dict[int, dict[bool, dict[str, nn.Module]]] = {}


def owner_of(name: str) -> str:
    """Return the name of the module that contains the parameter or module ``name``."""
    return name.rpartition(".")[0]


@contextmanager
def fixed_modules(network: nn.Module) -> Iterator[None]:
    """Walk the modules of ``network`` only once within the context, where they do not change."""
    outermost = id(network) not in _FIXED
    found = _FIXED.setdefault(id(network), {})
    try:
        yield
    finally:
        if outermost and _FIXED.get(id(network)) is found:
            del _FIXED[id(network)]


def modules_of(network: nn.Module, *, once: bool = False) -> Mapping[str, nn.Module]:
    """Return all modules by name; shared ones under all names, or if ``once`` under the first."""
    walked = _FIXED.get(id(network), {})
    if (known := walked.get(once)) is not None:
        return known
    found: dict[str, nn.Module] = {}
    _add_modules("", network, found, set() if once else None)
    walked[once] = found
    return found


def _add_modules(
    name: str, module: nn.Module, found: dict[str, nn.Module], seen: set[int] | None
) -> None:
    """Add a module and those within it, as ``named_modules`` does, whose generators are slow."""
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    found[name] = module
    prefix = f"{name}." if name else ""
    for key, child in module._modules.items():
        if child is not None:
            _add_modules(prefix + key, child, found, seen)


def tensors_of(
    network: nn.Module,
) -> Iterator[tuple[str, dict[str, torch.Tensor | None], str, torch.Tensor]]:
    """Yield the full name, the dict, the key in it, and the tensor of each parameter and buffer.

    Shared tensors are yielded under each of their names.
    """
    for name, module in modules_of(network).items():
        prefix = f"{name}." if name else ""
        stores: tuple[dict[str, torch.Tensor | None], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]
        for store in stores:
            for key, tensor in store.items():
                if tensor is not None:
                    yield prefix + key, store, key, tensor


def constants_of(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the full name and the tensor of each constant that a module keeps in an attribute.

    It is neither a parameter nor a buffer, e.g. a table of sines. Weights of layers that hooks
    compute are left out.
    """
    for name, module in modules_of(network).items():
        for key, tensor in vars(module).items():
            if type(tensor) is not torch.Tensor or not tensor.is_floating_point():
                continue
            if not hasattr(module, f"{key}_orig") and not hasattr(module, f"{key}_v"):
                yield f"{name}.{key}" if name else key, tensor


def tensor_named(network: nn.Module, name: str) -> Any:
    """Return the parameter or buffer with a full name."""
    owner, _, attribute = name.rpartition(".")
    return getattr(network.get_submodule(owner), attribute)


def is_depthwise(layer: Any) -> bool:
    """Return whether each channel of a convolution has separate outputs, without a sum."""
    groups = getattr(layer, "groups", 1)
    return bool(groups > 1 and groups == layer.in_channels)


def inputs_axis(weight: torch.Tensor, axis: int | None) -> int | None:
    """Return the axis of the inputs of a weight outside known layers, with outputs along ``axis``.

    A matrix may have its outputs along the axis 1, else they are along the axis 0. None for a
    depthwise filter (O, 1, …), which has no inputs that a cut removes.
    """
    if axis == 1 and weight.dim() == 2:
        return 0
    return 1 if weight.dim() > 1 and weight.shape[1] > 1 else None


def weight_rows(layer: Any) -> torch.Tensor:
    """Return the weight of a layer as (outputs, inputs of a group, kernel).

    Transposed convolutions store their weight as (inputs, outputs of a group, …).
    """
    if isinstance(layer, nn.RNNBase):
        parts = [getattr(layer, name) for name in INPUT_WEIGHTS if hasattr(layer, name)]
        return torch.cat(parts)[..., None]
    if isinstance(layer, nn.MultiheadAttention):
        packed: torch.Tensor = layer.in_proj_weight
        return packed[..., None]
    weight: torch.Tensor = layer.weight
    if not isinstance(layer, TRANSPOSED):
        return weight.reshape(*weight.shape[:2], -1)
    groups, (inputs, outputs) = layer.groups, weight.shape[:2]
    grouped = weight.reshape(groups, inputs // groups, outputs, -1).transpose(1, 2)
    return grouped.reshape(groups * outputs, inputs // groups, -1)


def weight_from_rows(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """Convert ``rows`` (outputs, inputs of a group, kernel) to the layout of the weight."""
    if isinstance(layer, TRANSPOSED):
        rows = rows.reshape(layer.groups, -1, *rows.shape[1:]).transpose(1, 2)
    return rows.reshape(layer.weight.shape)


def taps_of_output(layer: Any) -> float:
    """Return the fraction of a kernel used for one output, below 1 if transposed."""
    return 1 / math.prod(layer.stride) if isinstance(layer, TRANSPOSED) else 1.0


def twins_of(network: nn.Module, layers: Collection[str]) -> dict[str, list[str]]:
    """Return the layers that share a weight with an earlier layer, by the name of that layer."""
    first: dict[int, str] = {}
    twins: dict[str, list[str]] = {}
    for name, layer in modules_of(network, once=True).items():
        weight = getattr(layer, "weight", None)
        if name in layers and weight is not None and weight.dim() > 1:
            earlier = first.setdefault(id(weight), name)
            if earlier != name:
                twins.setdefault(earlier, []).append(name)
    return twins
