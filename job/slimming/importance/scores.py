"""Scores: the importance of each channel, and the interface of criteria that compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from job.slimming.calibration.input_statistics import CalibrationData
    from job.slimming.graph.groups import ChannelGraph

Scores = np.ndarray[Any, np.dtype[np.float64]]  # (count,) by channel number; nan if not ranked
NO_LABELS = (
    "needs calibration images with labels (B,), the numbers of their classes; there are none"
)


@dataclass(frozen=True)
class ScoreInputs:
    """Inputs of a criterion: a network, its channel graph, calibration data, and a seed."""

    network: nn.Module
    graph: ChannelGraph
    calibration: CalibrationData
    seed: int


@dataclass(frozen=True)
class Criterion:
    """Importance criterion: an entry of the table ``CRITERIA``.

    ``score`` returns the importance of each channel (count,). The flags tell what it needs:
    calibration ``images``, the ``statistics`` of layer inputs over them, ``labels`` of the images,
    and ``gradients`` (it runs with autograd enabled). If ``accumulated``, a score is the loss of
    removing the channel together with all less important ones.
    """

    score: Callable[[ScoreInputs], Scores]
    help: str
    images: bool = False
    statistics: bool = False
    labels: bool = False
    gradients: bool = False
    accumulated: bool = False
