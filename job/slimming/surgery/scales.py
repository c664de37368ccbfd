"""Scales of rows, which compensate for a changed scale of attention.

Attention divides products of queries and keys by sqrt(D), where D is their number of channels.
If code computes D from the current number, the narrow network divides by the root of a smaller
number. The weights of its queries are multiplied by the root of the kept fraction, so that the
products equal the products in the wide network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.slimming.graph.layer_rules import layer_rule
from job.slimming.graph.layers import inputs_axis, modules_of, tensor_named

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from job.slimming.planning.layer_channels import LayerChannels, Layers

SCALED_SIDES = ("out", "through")


def row_scales(channels: LayerChannels, count: int) -> torch.Tensor:
    """Return the factors (count,) of the outputs of a narrow layer, in float64."""
    scales = torch.ones(count, dtype=torch.float64)
    for rows, over, under in channels.scaled:
        scales[list(rows)] *= (over / under) ** 0.5
    return scales


def scaled_rows(tensor: torch.Tensor, channels: LayerChannels, axis: int = 0) -> torch.Tensor:
    """Return the narrow ``tensor``, whose outputs are along ``axis``, with scales in float64."""
    scales = row_scales(channels, tensor.shape[axis]).to(tensor.device)
    return tensor.double() * scales.reshape(-1, *[1] * (tensor.dim() - axis - 1))


def has_scaled_rows(sides: Sequence[str]) -> bool:
    """Return whether the rows of a tensor are outputs of its layer, or channels that pass it."""
    return sides[0] in SCALED_SIDES


def set_exact_scales(copy: nn.Module, wide: nn.Module, layers: Layers) -> None:
    """Set scaled rows of ``copy``, a narrow network in higher precision, without rounding."""
    for name, channels in layers.items():
        if channels.scaled:
            for narrow, whole, sides in _scaled_tensors(copy, wide, name, channels):
                for axis, side in enumerate(sides[: whole.dim()]):
                    kept = channels.in_ if side == "in" else channels.out if side else None
                    if kept is not None:
                        whole = whole.index_select(axis, torch.tensor(kept, device=whole.device))
                rows = next(axis for axis, side in enumerate(sides) if side in SCALED_SIDES)
                with torch.no_grad():
                    narrow.copy_(scaled_rows(whole.detach().cpu(), channels, rows))


def _scaled_tensors(
    copy: nn.Module, wide: nn.Module, name: str, channels: LayerChannels
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Sequence[str]]]:
    """Yield the tensors of the layer or parameter ``name`` in both networks, and their sides.

    The side of an axis that is not cut is empty.
    """
    if name not in modules_of(wide):
        narrow, whole = tensor_named(copy, name), tensor_named(wide, name)
        rows = channels.axis
        if rows is None:
            rows = next((axis for axis, size in enumerate(whole.shape) if size > 1), 0)
        along = {inputs_axis(whole, channels.axis): "in", rows: "out"}
        yield narrow, whole, [along.get(axis, "") for axis in range(whole.dim())]
        return
    layers = copy.get_submodule(name), wide.get_submodule(name)
    rule = layer_rule(layers[0])
    for attribute, sides in rule.tensors.items() if rule else ():
        narrow, whole = (getattr(layer, attribute, None) for layer in layers)
        if narrow is not None and whole is not None and has_scaled_rows(sides):
            yield narrow, whole, sides
