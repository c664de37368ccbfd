"""The numbers of one epoch of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from job.errors import GammaslimError


@dataclass(frozen=True)
class EpochResult:
    """The numbers of one epoch; losses and accuracies are means over every image of the split.

    ``step`` counts optimizer steps since the run began, ``seconds`` covers training and evaluation.
    ``gamma_mean`` is the mean of |γ| and ``gamma_small`` the share of small ones; None without a
    BatchNorm.
    """

    round: int
    epoch: int
    step: int
    train_loss: float
    train_acc: float
    valid_loss: float
    valid_acc: float
    lr: float
    images_per_second: float
    seconds: float
    gamma_mean: float | None = None
    gamma_small: float | None = None

    def check_finite(self) -> None:
        """Raise GammaslimError when a loss is not a number."""
        if not math.isfinite(self.train_loss + self.valid_loss):
            raise GammaslimError(
                f"round {self.round}, epoch {self.epoch}: the training loss became "
                f"{self.train_loss}, the validation loss {self.valid_loss}: try a lower --lr, "
                "or --precision fp32"
            )
