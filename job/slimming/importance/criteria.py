"""How much a channel matters: the larger, the later it is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.slimming.graph.selection import batchnorms

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.importance.scores import Scores


def gamma_importance(network: nn.Module, graph: ChannelGraph) -> Scores:
    """|γ| of the BatchNorms that a channel passes, their mean; nan where there is none.

    Liu et al. 2017, section 3; the homework ranks by γ itself, which is the same while γ > 0.
    """
    names, norms = {norm for group in graph.groups for norm in group.norms}, batchnorms(network)
    mean = _Mean(graph.count)
    ranking = [
        position
        for position in graph.slots
        if position.side in ("through", "select") and position.layer in names
    ]
    if ranking:
        gammas = torch.cat([norms[position.layer].weight.detach() for position in ranking])
        ids = np.concatenate([position.ids for position in ranking])
        mean.add(ids, gammas.double().abs().cpu().numpy())
    return mean.result()


def magnitude_importance(network: nn.Module, graph: ChannelGraph) -> Scores:
    """L2 norm of the weights that write a channel, the mean over its writers (Li et al. 2017)."""
    mean = _Mean(graph.count)
    for position in graph.slots:
        if position.side == "out":
            weight = _weight(network, position.layer).detach().double().cpu()
            mean.add(position.ids, weight.flatten(1).norm(dim=1).numpy())
    return mean.result()


def random_importance(graph: ChannelGraph, seed: int) -> Scores:
    """Numbers in [0, 1) that say nothing: what any other importance must beat."""
    scores: Scores = np.random.Generator(np.random.Philox(seed)).random(graph.count)
    return scores


def _weight(network: nn.Module, name: str) -> Any:
    try:
        return network.get_parameter(name)
    except AttributeError:
        return network.get_submodule(name).weight


class _Mean:
    """Means of what several positions say of a channel."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.ids: list[Ids] = [np.zeros(0, np.int64)]
        self.values: list[Scores] = [np.zeros(0)]

    def add(self, ids: Ids, values: Scores) -> None:
        self.ids.append(ids)
        self.values.append(values)

    def result(self) -> Scores:
        ids = np.concatenate(self.ids)
        sums = np.bincount(ids, np.concatenate(self.values), self.count)
        with np.errstate(invalid="ignore"):
            return sums / np.bincount(ids, minlength=self.count)
