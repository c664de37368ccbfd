"""Importance criteria. Channels with the smallest scores are cut first.

``CRITERIA`` is the table of criteria, by the names of ``--importance``,
which ``config.ImportanceName`` lists too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from job.errors import UsageError
from job.slimming.graph.layers import modules_of, tensor_named, weight_rows
from job.slimming.graph.removed_layers import ConstantOutput
from job.slimming.graph.selection import batchnorms
from job.slimming.importance.refit import refit_importance
from job.slimming.importance.scores import NO_LABELS, Criterion, ScoreInputs
from job.slimming.importance.taylor import taylor_importance
from job.slimming.importance.unranked import score_unranked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from job.slimming.calibration.input_statistics import CalibrationData
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import ChannelSlot, Ids
    from job.slimming.importance.scores import Scores


def gamma_importance(network: nn.Module, graph: ChannelGraph) -> Scores:
    """Return the mean |γ| of the BatchNorms of each channel (count,); nan without a BatchNorm.

    Liu et al. 2017, section 3. The homework ranks by γ itself, which is the same for γ > 0.
    """
    ranking, norms = {norm for group in graph.groups for norm in group.norms}, batchnorms(network)
    slots = [s for s in graph.slots if s.side in ("through", "select") and s.layer in ranking]
    if not slots:
        return np.full(graph.count, np.nan)
    gammas = torch.cat([norms[slot.layer].weight.detach() for slot in slots])
    return _mean_scores(graph, [s.ids for s in slots], gammas.double().abs().cpu().numpy())


def l2_importance(network: nn.Module, graph: ChannelGraph) -> Scores:
    """Return the mean L2 norm of the weights that produce each channel, over layers (count,).

    Li et al. 2017.
    """
    modules = modules_of(network)
    slots = [
        slot
        for slot in graph.slots
        if slot.side == "out" and not isinstance(modules.get(slot.layer), ConstantOutput)
    ]
    norms = [np.zeros(0)]
    for slot in slots:
        rows = _rows(modules, slot).detach().double().cpu()
        norms.append(rows.flatten(1).norm(dim=1).numpy())
    return _mean_scores(graph, [s.ids for s in slots], np.concatenate(norms))


def random_importance(graph: ChannelGraph, seed: int) -> Scores:
    """Return uniform random numbers (count,) in [0, 1), the baseline of other criteria."""
    scores: Scores = np.random.Generator(np.random.Philox(seed)).random(graph.count)
    return scores


def _rows(modules: Mapping[str, nn.Module], slot: ChannelSlot) -> torch.Tensor:
    """Return the weight of a layer or parameter, with outputs along the first axis."""
    if slot.layer in modules:
        return weight_rows(modules[slot.layer])
    matrix: torch.Tensor = tensor_named(modules[""], slot.layer)
    return matrix.movedim(slot.axis or 0, 0)


def _mean_scores(graph: ChannelGraph, ids: Sequence[Ids], values: Scores) -> Scores:
    """Return the mean of ``values`` (n,) by channel number in ``ids``; nan without a value."""
    numbers = np.concatenate([np.zeros(0, np.int64), *ids])
    sums = np.bincount(numbers, values, graph.count)
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(numbers, minlength=graph.count)


CRITERIA: dict[str, Criterion] = {
    "gamma": Criterion(
        lambda given: gamma_importance(given.network, given.graph),
        "the scale |γ| of the channel's BatchNorm",
    ),
    "l2": Criterion(
        lambda given: l2_importance(given.network, given.graph),
        "the L2 norm of the weights that produce the channel",
    ),
    "random": Criterion(
        lambda given: random_importance(given.graph, given.seed),
        "random numbers: a baseline",
    ),
    "refit": Criterion(
        lambda given: refit_importance(given.network, given.graph, given.calibration.statistics),
        "the error of the next layers after a least-squares refit without the channel",
        images=True,
        statistics=True,
        accumulated=True,
    ),
    "taylor": Criterion(
        lambda given: taylor_importance(given.network, given.graph, given.calibration.images()),
        "the change of the loss without the channel, to first order",
        images=True,
        labels=True,
        gradients=True,
    ),
}


def score_channels(
    importance: str,
    network: nn.Module,
    graph: ChannelGraph,
    calibration: CalibrationData,
    seed: int = 0,
) -> Scores:
    """Return the importance (count,) of every channel by the criterion named ``importance``.

    Raises UsageError if the criterion needs labels and there are none.
    """
    criterion = CRITERIA[importance]
    if criterion.labels and calibration.batches is None:
        raise UsageError(f"--importance {importance} {NO_LABELS}")
    with torch.set_grad_enabled(criterion.gradients):
        scores = criterion.score(ScoreInputs(network, graph, calibration, seed))
    return score_unranked(network, graph, scores, l2_importance)
