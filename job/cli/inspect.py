"""``inspect``: channel groups of MODEL, costs of layers, and what cannot be cut."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from job.artifacts.json_records import to_json
from job.cli.open_model import open_model
from job.console import counted, print_result, table
from job.report.tables import layers_table
from job.slimming.analysis import analyse
from job.slimming.graph.reasons import explain
from job.slimming.importance.criteria import gamma_importance
from job.slimming.planning.base import full_group_sizes
from job.slimming.planning.cost import example_image, layer_costs, network_cost
from job.slimming.planning.layer_channels import removed_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.artifacts.records import Lineage
    from job.cli.command_options import ModelOptions
    from job.slimming.importance.scores import Scores
    from job.slimming.planning.cost import Cost, LayerCost

QUARTILES = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "max": 1.0}


@dataclass(frozen=True)
class InspectedGroup:
    """A channel group: its channels, those ``of`` the base, and the quartiles of their γ.

    ``gamma`` is None if no BatchNorm ranks the channels. ``positions`` are sides of layers.
    """

    group: str
    channels: int
    of: int
    gamma: Mapping[str, float] | None
    norms: tuple[str, ...]
    positions: tuple[str, ...]


@dataclass(frozen=True)
class InspectedBlock:
    """Channels that are not cut: the reason, the line of code, and the change that frees them."""

    layer: str
    channels: int
    reason: str
    place: str
    remedy: str


@dataclass(frozen=True)
class Inspection:
    """What ``--json`` prints of a network."""

    model: str
    width: float
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    cost: Cost
    groups: tuple[InspectedGroup, ...]
    blocked: tuple[InspectedBlock, ...]
    removed: tuple[str, ...]
    layers: tuple[LayerCost, ...]
    metrics: Mapping[str, object]
    lineage: Lineage


def inspect(model: ModelOptions, as_json: bool) -> None:
    """Print channel groups with their γ, costs of each layer, and what cannot be cut and why."""
    found = _inspect(*open_model(model))
    print_result(json.dumps(to_json(found), indent=1) if as_json else _text(found))


def _inspect(network: nn.Module, card: ModelCard) -> Inspection:
    size = card.preprocessing.input_size
    graph = analyse(network, example_image(size))
    gamma, sizes = gamma_importance(network, graph), full_group_sizes(network, graph, card.base)
    groups = tuple(
        InspectedGroup(
            group=group.name,
            channels=group.size,
            of=sizes[group.name],
            gamma=_quartiles(gamma[group.channels]),
            norms=group.norms,
            positions=tuple(f"{layer} {side}" for layer, side in group.slots),
        )
        for group in graph.groups
    )
    return Inspection(
        model=card.model,
        width=card.width,
        num_classes=card.num_classes,
        class_names=card.class_names,
        image_size=card.preprocessing.size,
        cost=network_cost(network, size),
        groups=groups,
        blocked=tuple(
            InspectedBlock(b.layer, b.channels, b.reason, b.place, b.remedy) for b in graph.blocked
        ),
        removed=tuple(removed_layers(card.layers)),
        layers=tuple(layer_costs(network, size)),
        metrics=card.metrics,
        lineage=card.lineage,
    )


def _quartiles(gamma: Scores) -> dict[str, float] | None:
    if np.isnan(gamma).any():
        return None  # no BatchNorm ranks its channels
    return dict(zip(QUARTILES, np.quantile(gamma, [*QUARTILES.values()]).tolist(), strict=True))


def _text(found: Inspection) -> str:
    cost, classes = found.cost, counted(found.num_classes, "class")
    title = f"{found.model} at width {found.width:.4f}, {classes}, {found.image_size} pixels"
    costs = (
        f"{cost.channels:,} channels, {cost.params:,} params, {cost.macs:,} MACs, "
        f"{cost.bytes:,} bytes"
    )
    groups = [
        (g.group, f"{g.channels}/{g.of}", *(f"{value:.4f}" for value in g.gamma.values()))
        for g in found.groups
        if g.gamma
    ]
    blocked = [
        (b.layer, str(b.channels), explain(b.reason, b.place, b.remedy)) for b in found.blocked
    ]
    blocked += [
        (g.group, str(g.channels), "no BatchNorm ranks them: ranked by other norms or L2")
        for g in found.groups
        if not g.gamma
    ]
    parts = [
        f"{title}\n{costs}",
        layers_table(found.layers),
        "channels that can be cut, and the |γ| that ranks them\n"
        + table(("group", "channels", *QUARTILES), groups),
        "channels that are not cut\n" + table(("layer", "channels", "why"), blocked, left=3),
    ]
    if found.removed:
        parts.append("layers that were removed whole\n" + "\n".join(found.removed))
    return "\n\n".join(parts)
