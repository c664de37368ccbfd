"""Scores of channels that a criterion by BatchNorms or by consumers does not rank.

They are ranked by the |γ| of the norms that they pass through, else by the L2 norm of the weights
that produce them, relative to the mean of their group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.slimming.graph.layers import BATCHNORM, NORMS, modules_of
from job.slimming.graph.selection import unwrap_selection

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph, ChannelGroup
    from job.slimming.graph.union import Ids
    from job.slimming.importance.scores import Scores


def score_unranked(
    network: nn.Module,
    graph: ChannelGraph,
    scores: Scores,
    norms_of_weights: Callable[[nn.Module, ChannelGraph], Scores],
) -> Scores:
    """Return ``scores`` (count,), with new scores for the parts that the criterion does not rank.

    A part is a group, or a block of a group whose blocks all lose the same number of channels. The
    new scores of a part have the same mean as all channels with a score, or 1 if there are none.
    ``norms_of_weights`` returns the L2 norms (count,) of the weights that produce each channel.
    """
    unranked = [part for group in graph.groups for part in _unranked_parts(group, scores)]
    if not unranked:
        return scores
    ranked = scores[np.concatenate([np.zeros(0, np.int64), *(g.channels for g in graph.groups)])]
    ranked = ranked[np.isfinite(ranked)]
    scale, gammas = ranked.mean() if len(ranked) else 1.0, _gammas(network, graph)
    scores, weights = scores.copy(), norms_of_weights(network, graph)
    for channels in unranked:
        scores[channels] = scale * _relative(gammas[channels], weights[channels])
    return scores


def _unranked_parts(group: ChannelGroup, scores: Scores) -> list[Ids]:
    """Return the channels of a group that is not ranked, or of each such block of it."""
    missing = np.isnan(scores[group.channels])
    if not missing.any():
        return []
    if not group.norms or missing.all():
        return [group.channels]
    blocks = () if group.blocks is None else group.blocks
    return [block for block in blocks if np.isnan(scores[block]).all()]


def _relative(*criteria: Scores) -> Scores:
    """Return the first of the ``criteria`` (n,) that is complete, relative to its mean, or ones."""
    for values in criteria:
        if not np.isnan(values).any() and values.mean() > 0:
            relative: Scores = values / values.mean()
            return relative
    return np.ones(len(criteria[0]))


def _gammas(network: nn.Module, graph: ChannelGraph) -> Scores:
    """Return the mean |γ| of the norms that each channel passes through, or that select it."""
    modules = modules_of(network)
    sums, counts = np.zeros(graph.count), np.zeros(graph.count)
    for slot in graph.slots:
        module = modules.get(slot.layer)
        norm = module if module is None else unwrap_selection(module)
        weight = getattr(norm, "weight", None) if slot.side in ("through", "select") else None
        if isinstance(norm, (BATCHNORM, *NORMS)) and weight is not None:
            np.add.at(sums, slot.ids, weight.detach().flatten().double().abs().cpu().numpy())
            np.add.at(counts, slot.ids, 1)
    with np.errstate(invalid="ignore"):
        means: Scores = sums / counts
    return means
