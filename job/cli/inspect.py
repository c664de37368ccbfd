"""``inspect``: channel groups of MODEL, costs of layers, and what cannot be cut."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from job.artifacts.json_records import to_json
from job.cli.model import open_model
from job.console import counted, print_result, table
from job.report.tables import layers_table
from job.slimming.analysis import analyse
from job.slimming.importance.criteria import gamma_importance
from job.slimming.planning.base import full_group_sizes
from job.slimming.planning.cost import example_image, layer_costs, network_cost
from job.slimming.planning.layer_channels import removed_layers

if TYPE_CHECKING:
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions
    from job.slimming.importance.scores import Scores

QUARTILES = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "max": 1.0}


def inspect(model: ModelOptions, as_json: bool) -> None:
    """Print channel groups with their γ, costs of each layer, and what cannot be cut and why."""
    network, card = open_model(model)
    record = _record(network, card)
    print_result(json.dumps(record, indent=1) if as_json else _text(record, network, card))


def _record(network: nn.Module, card: ModelCard) -> dict[str, Any]:
    size = card.preprocessing.size
    graph = analyse(network, example_image(size))
    gamma, sizes = gamma_importance(network, graph), full_group_sizes(network, graph, card.base)
    groups = [
        {
            "group": group.name,
            "channels": group.size,
            "of": sizes[group.name],
            "gamma": _quartiles(gamma[group.channels]),
            "norms": list(group.norms),
            "positions": [f"{layer} {side}" for layer, side in group.slots],
        }
        for group in graph.groups
    ]
    return {
        "model": card.model,
        "width": card.width,
        "num_classes": card.num_classes,
        "class_names": list(card.class_names),
        "image_size": size,
        "cost": network_cost(network, size).to_dict(),
        "groups": groups,
        "blocked": [asdict(blocked) for blocked in graph.blocked],
        "removed": removed_layers(card.layers),
        "layers": [asdict(layer) for layer in layer_costs(network, size)],
        "metrics": card.metrics,
        "lineage": to_json(card.lineage),
    }


def _quartiles(gamma: Scores) -> dict[str, float] | None:
    if np.isnan(gamma).any():
        return None  # no BatchNorm ranks its channels
    return dict(zip(QUARTILES, np.quantile(gamma, [*QUARTILES.values()]).tolist(), strict=True))


def _text(record: dict[str, Any], network: nn.Module, card: ModelCard) -> str:
    size, cost = record["image_size"], record["cost"]
    names = {"channels": "channels", "params": "params", "macs": "MACs", "bytes": "bytes"}
    costs = ", ".join(f"{cost[key]:,} {name}" for key, name in names.items())
    groups = [
        (
            group["group"],
            f"{group['channels']}/{group['of']}",
            *(f"{value:.4f}" for value in (group["gamma"] or {}).values()),
        )
        for group in record["groups"]
        if group["gamma"]
    ]
    blocked = [(b["layer"], str(b["channels"]), b["reason"]) for b in record["blocked"]]
    blocked += [
        (g["group"], str(g["channels"]), "no BatchNorm ranks them: use another importance")
        for g in record["groups"]
        if not g["gamma"]
    ]
    classes = counted(card.num_classes, "class")
    title = f"{card.model} at width {card.width:.4f}, {classes}, {size} pixels"
    parts = [
        f"{title}\n{costs}",
        layers_table(layer_costs(network, size)),
        "channels that can be cut, and the |γ| that ranks them\n"
        + table(("group", "channels", *QUARTILES), groups),
        "channels that are not cut\n" + table(("layer", "channels", "why"), blocked, left=3),
    ]
    if record["removed"]:
        parts.append("layers that were removed whole\n" + "\n".join(record["removed"]))
    return "\n\n".join(parts)
