"""A small trainer, a session that keeps what a trainer reports, and how many weights changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.config import PruneConfig
from job.data.layout import open_data
from job.data.preprocessing import Preprocessing
from job.distributed.collectives import start
from job.training.evaluation import Evaluator
from job.training.session import Unattended
from job.training.trainer import Trainer
from support.datasets import write_noise_idx

if TYPE_CHECKING:
    from job.training.epoch import EpochResult
    from job.training.gamma import GammaHistogram

SMALL = Preprocessing.of("small", 32)


class Recorder(Unattended):
    """Keeps the results of epochs and the histograms of γ."""

    def __init__(self) -> None:
        self.epochs: list[EpochResult] = []
        self.histograms: list[GammaHistogram] = []

    def epoch_finished(self, result: EpochResult) -> None:
        self.epochs.append(result)

    def gamma_measured(self, when: str, epoch: int, histogram: GammaHistogram) -> None:
        self.histograms.append(histogram)


def trainer(folder: Path, **options: Any) -> Trainer:
    """A trainer on 90 noise images of four classes, with 30 to validate on, on the CPU."""
    data = open_data(str(write_noise_idx(folder / "idx", 90, 30)))
    config = PruneConfig(device="cpu", batch_size=16, **options)
    accelerator = start("cpu", "fp32")
    evaluator = Evaluator(data.splits["validation"], 4, SMALL, accelerator, 0)
    return Trainer(data.splits["training"], evaluator, config, SMALL, accelerator, 0)


def changed_parameters(before: nn.Module, after: nn.Module) -> int:
    """How many parameters of two networks of one shape differ."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return sum(not torch.equal(old, new) for old, new in pairs)
