"""Target of a cut of MODEL, from the options of ``slim`` and ``sensitivity``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from job.config import policy_for
from job.slimming.planning.allocation import Allocation
from job.slimming.planning.target import Budget

if TYPE_CHECKING:
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import SensitivityOptions, SlimOptions


def single_cut(
    target: str, options: SlimOptions | SensitivityOptions, policy: str | None = None
) -> Allocation:
    """Return the ``target`` of a cut, with the policy that fits it by default."""
    budget = Budget.parse(target)
    bounds = options.round_to, options.min_keep, options.latency_batch
    return Allocation(policy or policy_for(target), budget, *bounds)


def uncut_network(network: nn.Module, card: ModelCard) -> nn.Module:
    """Return the network before all cuts; a latency target is a fraction of its latency."""
    if not card.layers:
        return network
    return replace(card, layers={}).build().eval().to(next(network.parameters()).device)
