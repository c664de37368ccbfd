"""Folding: constants that replace removed channels, added to the consumers of the channels.

For ``beta`` the constant is act(β), the output of a channel with γ = 0, which Liu et al. 2017 drop.
For ``mean`` it is the mean of the channel over the calibration images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.slimming.calibration.input_statistics import measure_inputs
from job.slimming.graph.selection import batchnorms
from job.slimming.inputs import move_like
from job.slimming.surgery.clone import clone_module
from job.slimming.surgery.probe import probe_batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.slimming.calibration.input_statistics import InputStatistics
    from job.slimming.compensation.cut_pair import CutPair


def fold_means(pair: CutPair, statistics: Mapping[str, InputStatistics]) -> None:
    """Add the means of the removed channels to the consumers of the narrow network, in place.

    ``statistics`` are those of the wide network, by layer. Other layers are not changed.
    """
    for consumer in pair.consumers():
        if consumer.layer not in statistics or pair.keep[consumer.channels].all():
            continue
        fits = []
        for part, stays in pair.kept_columns(consumer):
            constant = torch.where(stays, 0, statistics[consumer.layer].mean[part])
            fits.append((torch.eye(len(stays)).double()[:, stays], constant))
        pair.apply_fits(consumer, fits)


def beta_statistics(pair: CutPair) -> dict[str, InputStatistics]:
    """Return the statistics of the consumers' inputs when the removed channels have γ = 0.

    The BatchNorm then outputs β for any image, so that one batch of noise is enough.
    """
    network = clone_module(pair.wide, {})
    norms = batchnorms(network)
    for slot in pair.graph.slots:
        removed = ~pair.keep[slot.ids]
        if slot.side not in ("through", "select") or not removed.any():
            continue
        norm = norms.get(slot.layer)  # None: a depthwise convolution, a PReLU
        if norm is not None and norm.weight is not None:
            with torch.no_grad():
                norm.weight[torch.from_numpy(removed).to(norm.weight.device)] = 0
    weight = next(p for p in pair.wide.parameters() if p.is_floating_point())
    return measure_inputs(
        network, pair.graph, [(move_like(probe_batch(pair.example), weight), None)]
    )
