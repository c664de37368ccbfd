"""Origin of a narrow network: the elements of the wide parameters that its parameters are cut from.

The surgery itself determines them. It is applied to a network whose parameters contain their own
positions, so that every kind of cut is covered, including cuts of grouped convolutions.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.errors import UsageError
from job.slimming.graph.layers import owner_of
from job.slimming.graph.removed_layers import ConstantOutput
from job.slimming.surgery.outline import outline_of
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from job.slimming.planning.layer_channels import Layers
    from job.slimming.surgery.outline import NetworkOutline, TensorOutline

NEW = 0  # position of numbers that are in no wide parameter


@dataclass(frozen=True)
class Origin:
    """Wide network of a cut to ``layers``: its outline, and its parameters by name."""

    outline: NetworkOutline
    parameters: dict[str, weakref.ref[nn.Parameter]]
    layers: Layers


@dataclass(frozen=True)
class ParameterSource:
    """Wide parameter ``wide`` that a narrow one is cut from, and flat indices ``kept`` into it.

    ``kept`` has the shape of the narrow parameter; None if nothing was cut.
    """

    wide: nn.Parameter
    kept: torch.Tensor | None

    def cut(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``values``, shaped as the wide parameter, cut as the parameter was.

        It has the device and the memory format of ``like``, the narrow parameter.
        """
        if self.kept is not None:
            values = values.flatten()[self.kept.to(values.device)]
        return torch.empty_like(like, dtype=values.dtype, requires_grad=False).copy_(values)


_ORIGINS: weakref.WeakKeyDictionary[nn.Module, Origin] = weakref.WeakKeyDictionary()


def record_origin(narrow: nn.Module, wide: nn.Module, layers: Layers) -> None:
    """Remember that ``narrow`` is ``wide`` cut to ``layers``, as long as ``narrow`` exists.

    The wide network is not kept alive.
    """
    parameters = {name: weakref.ref(parameter) for name, parameter in wide.named_parameters()}
    _ORIGINS[narrow] = Origin(outline_of(wide), parameters, layers)


def origin_of(narrow: nn.Module) -> Origin:
    """Return the origin of ``narrow``; raises UsageError if no cut of this process returned it."""
    origin = _ORIGINS.get(narrow) if isinstance(narrow, nn.Module) else None
    if origin is None:
        raise UsageError(
            "narrow must be the network that slim or apply returned in this process, itself and "
            "not a copy or a module around it: call new_optimizer directly after the cut"
        )
    return origin


def sources_of(narrow: nn.Module, origin: Origin) -> dict[str, ParameterSource | None]:
    """Return where each parameter of ``narrow`` comes from, by name; None for a new parameter.

    Parameters whose wide one no longer exists are left out. Raises UsageError if ``narrow`` has
    changed since the cut.
    """
    positions, offsets = _positions_of(origin.outline)
    cut, parameters = apply_plan(positions, origin.layers), list(origin.parameters.values())
    found = dict(cut.named_parameters())
    sources: dict[str, ParameterSource | None] = {}
    for name, parameter in narrow.named_parameters():
        if name not in found or found[name].shape != parameter.shape:
            raise UsageError(
                f"narrow has changed since the cut: {name} is {tuple(parameter.shape)}; call "
                "new_optimizer directly after the cut, and add later parameters by add_param_group"
            )
        place = found[name].detach()
        if _is_new(name, place, cut, positions):
            sources[name] = None
            continue
        number = bisect_right(offsets, int(place.flatten()[0])) - 1
        if (wide := parameters[number]()) is not None:
            kept = None if place.numel() == wide.numel() else place - offsets[number]
            sources[name] = ParameterSource(wide, kept)
    return sources


def _positions_of(outline: NetworkOutline) -> tuple[nn.Module, list[int]]:
    """Return the network with consecutive positions as parameters, and where each one starts."""
    offsets, end = list[int](), [NEW + 1]

    def values(tensor: TensorOutline) -> torch.Tensor:
        if not tensor.is_parameter:
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        start = end[0]
        offsets.append(start)
        end[0] += tensor.shape.numel()
        places = torch.arange(start, end[0]).view(tensor.shape)
        return nn.Parameter(places, requires_grad=False)

    return outline.build(values), offsets


def _is_new(name: str, place: torch.Tensor, cut: nn.Module, wide: nn.Module) -> bool:
    """Return whether the parameter ``name`` was added by the cut: a bias, or a constant output."""
    if not place.numel() or bool((place == NEW).any()):
        return True
    owner = owner_of(name)
    constant = isinstance(cut.get_submodule(owner), ConstantOutput)
    return constant and not isinstance(wide.get_submodule(owner), ConstantOutput)
