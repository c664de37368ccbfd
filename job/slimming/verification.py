"""Proof of a cut: the narrow network computes what the wide one does without those channels."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from job.errors import GammaslimError
from job.slimming.graph import channel_graph

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.plan import Plan

TOLERANCE = 1e-9  # relative, in float64
PROBES = 2  # pictures


def verify(wide: nn.Module, narrow: nn.Module, plan: Plan, size: int) -> float:
    """Largest error of the narrow network's outputs, relative to the largest output.

    Both run on (2, 3, size, size) noise in float64 on the CPU; in the wide one the removed channels
    are zeroed in front of every layer that sums over them. Raises GammaslimError above 1e-9.
    """
    probe = torch.rand(
        PROBES, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected = _masked_outputs(_in_float64(wide), plan, probe)
    with torch.inference_mode():
        error = (_in_float64(narrow)(probe) - expected).abs().max()
    relative = float(error / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    if not relative <= TOLERANCE:  # NaN must fail too
        raise GammaslimError(
            f"the cut to width {plan.width:g} is wrong: the narrow network differs from the wide "
            f"one without those channels by {relative:.1e}, above {TOLERANCE:.0e}"
        )
    return relative


def _in_float64(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).cpu().double().eval()


def _masked_outputs(wide: nn.Module, plan: Plan, probe: torch.Tensor) -> torch.Tensor:
    for group in channel_graph(wide).groups:
        mask = torch.zeros(group.size, dtype=torch.float64)
        mask[list(plan.groups[group.name])] = 1

        def zero(_: nn.Module, inputs: tuple[torch.Tensor], mask: torch.Tensor = mask) -> object:
            return (inputs[0] * mask.view(-1, *[1] * (inputs[0].dim() - 2)),)

        for position in group.positions:
            if position.side == "in":
                wide.get_submodule(position.layer).register_forward_pre_hook(zero)
    with torch.inference_mode():
        outputs: torch.Tensor = wide(probe)
    return outputs
