"""A training session that keeps what a trainer reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.training.session import Unattended

if TYPE_CHECKING:
    from job.training.epoch import EpochResult
    from job.training.gamma import GammaHistogram


class Recorder(Unattended):
    """Keeps the results of epochs and the histograms of γ."""

    def __init__(self) -> None:
        self.epochs: list[EpochResult] = []
        self.histograms: list[GammaHistogram] = []

    def epoch_finished(self, result: EpochResult) -> None:
        self.epochs.append(result)

    def gamma_measured(self, when: str, epoch: int, histogram: GammaHistogram) -> None:
        self.histograms.append(histogram)
