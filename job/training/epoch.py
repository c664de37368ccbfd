"""The numbers of one epoch of training."""

from __future__ import annotations

import math
from collections.abc import Mapping  # noqa: TC003  (from_json reads the types)
from dataclasses import dataclass, field

from job.errors import GammaslimError

ACCURACY = "acc"  # the metric of classification
BRIEF = {"brief": True}  # metadata of a field that is written only if it is not the default


@dataclass(frozen=True)
class EpochResult:
    """The numbers of one epoch; losses and accuracies are means over every image of the split.

    ``step`` counts optimizer steps since the run began, ``seconds`` covers training and evaluation.
    ``gamma_mean`` is the mean of |γ| and ``gamma_small`` the share of small ones; None without a
    BatchNorm. For another task than classification, ``train_acc`` and ``valid_acc`` hold its
    ``metric``, whose name is in their keys, and ``metrics`` its other metrics on the validation
    split. ``train_acc`` is None for detection, since training does not predict boxes.
    """

    round: int
    epoch: int
    step: int
    train_loss: float
    train_acc: float | None = field(metadata={"key": "train_{metric}"})
    valid_loss: float
    valid_acc: float = field(metadata={"key": "valid_{metric}"})
    lr: float
    images_per_second: float
    seconds: float
    gamma_mean: float | None = None
    gamma_small: float | None = None
    metric: str = field(default=ACCURACY, metadata=BRIEF)
    metrics: Mapping[str, float] = field(default_factory=dict, metadata=BRIEF)

    def check_finite(self) -> None:
        """Raise GammaslimError when a loss is not a number."""
        if not math.isfinite(self.train_loss + self.valid_loss):
            raise GammaslimError(
                f"round {self.round}, epoch {self.epoch}: the training loss became "
                f"{self.train_loss}, the validation loss {self.valid_loss}: try a lower --lr, "
                "or --precision fp32"
            )
