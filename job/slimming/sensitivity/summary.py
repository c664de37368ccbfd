"""Summary of loss curves: the rows of ``Sensitivity``, with each group's shares of the costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from job.slimming.planning.cost_model import CostModel
from job.slimming.planning.plan import keep_all
from job.slimming.sensitivity.measure import units_at
from job.slimming.sensitivity.record import (
    GroupSensitivity,
    LossPoint,
    Sensitivity,
    UncutChannels,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph, ChannelGroup
    from job.slimming.planning.loss_curves import LossCurve
    from job.slimming.planning.plan import Plan

UNMEASURED = "none of the layers after them could be measured"


def summarise_losses(
    network: nn.Module,
    graph: ChannelGraph,
    curves: Mapping[str, LossCurve],
    fractions: Sequence[float],
    plan: Plan | None = None,
    target: str | None = None,
) -> Sensitivity:
    """Return the losses of each group at ``fractions``, from its curve in ``curves``, by name.

    ``plan`` is a cut that was planned with these curves, and ``target`` its METRIC=VALUE.
    """
    shares = _cost_shares(network, graph)
    rows = tuple(
        GroupSensitivity(
            group.name,
            group.size,
            *shares[group.name],
            tuple(_points(group, curves.get(group.name), fractions)),
            len(plan.groups[group.name]) if plan else None,
        )
        for group in graph.groups
    )
    blocked = [UncutChannels(b.layer, b.channels, b.reason) for b in graph.blocked]
    blocked += [
        UncutChannels(group.name, group.size, UNMEASURED)
        for group in graph.groups
        if group.name not in curves
    ]
    first = next(iter(curves.values()), None)
    return Sensitivity(
        first.kind if first else "",
        first.images if first else 0,
        tuple(fractions),
        target,
        rows,
        tuple(blocked),
    )


def _cost_shares(network: nn.Module, graph: ChannelGraph) -> dict[str, tuple[float, float]]:
    """Return the fractions of MACs and parameters saved without each group, by its name."""
    costs, shares = CostModel(network, graph, removals=False), {}
    whole = costs.cost(keep_all(graph))
    for group in graph.groups:
        keep = keep_all(graph)
        keep[group.channels] = False
        without_group = costs.cost(keep)
        shares[group.name] = (
            (whole.macs - without_group.macs) / max(1, whole.macs),
            (whole.params - without_group.params) / max(1, whole.params),
        )
    return shares


def _points(
    group: ChannelGroup, curve: LossCurve | None, fractions: Sequence[float]
) -> Iterator[LossPoint]:
    if curve is None:
        return
    losses = dict(zip(curve.counts, curve.losses, strict=True))
    blocks = 1 if group.blocks is None else len(group.blocks)
    for fraction in fractions:
        count = units_at(group.size // blocks, fraction)
        loss = losses.get(count)
        if loss is not None and not math.isfinite(loss):
            loss = None
        yield LossPoint(fraction, count * blocks, loss)
