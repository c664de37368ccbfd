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

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.planning.layer_channels import LayerChannels, Layers


def row_scales(channels: LayerChannels, count: int) -> torch.Tensor:
    """Return the factors (count,) of the outputs of a narrow layer, in float64."""
    scales = torch.ones(count, dtype=torch.float64)
    for rows, over, under in channels.scaled:
        scales[list(rows)] *= (over / under) ** 0.5
    return scales


def scaled_rows(tensor: torch.Tensor, channels: LayerChannels) -> torch.Tensor:
    """Return the narrow ``tensor`` (O, …) with scaled rows, in float64."""
    scales = row_scales(channels, len(tensor)).to(tensor.device)
    return tensor.double() * scales.reshape(-1, *[1] * (tensor.dim() - 1))


def set_exact_scales(copy: nn.Module, wide: nn.Module, layers: Layers) -> None:
    """Set scaled rows of ``copy``, a narrow network in higher precision, without rounding."""
    for name, channels in layers.items():
        if not channels.scaled:
            continue
        narrow, before = copy.get_submodule(name), wide.get_submodule(name)
        rule = layer_rule(narrow)
        for attribute, sides in rule.tensors.items() if rule else ():
            tensor, whole = getattr(narrow, attribute, None), getattr(before, attribute, None)
            if tensor is None or whole is None or sides[0] != "out":
                continue
            for axis, side in enumerate(sides):
                kept = channels.out if side == "out" else channels.in_
                if kept is not None:
                    whole = whole.index_select(axis, torch.tensor(kept, device=whole.device))
            with torch.no_grad():
                tensor.copy_(scaled_rows(whole.detach().cpu(), channels))
