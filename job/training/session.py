"""The specification of a round of training, and the session that the trainer reports to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from job.distributed.stop import Watch
    from job.training.checkpoint_content import Position
    from job.training.distillation import Distillation
    from job.training.epoch import EpochResult
    from job.training.gamma import GammaHistogram

_T = TypeVar("_T")


@dataclass(frozen=True)
class RoundSpec:
    """One round of training: ``epochs`` dense epochs, then ``sparse_epochs`` that penalise γ.

    Each of the two parts has its own learning-rate schedule.
    """

    round_index: int
    epochs: int
    sparse_epochs: int = 0
    first_step: int = 0  # optimizer steps that the run took before this round
    gamma_layers: tuple[str, ...] | None = (
        None  # layers whose γ is penalised; None: every BatchNorm
    )
    distillation: Distillation | None = None
    resume: Position | None = None  # None: train from the first batch
    compiled: bool = True  # with --compile

    @property
    def all_epochs(self) -> int:
        """Number of epochs, the sparse ones included."""
        return self.epochs + self.sparse_epochs


@dataclass
class RoundState:
    """The state of a round without weights: the next batch, and the best epoch so far."""

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0  # spent on this epoch so far
    best: EpochResult | None = None
    predictions: torch.Tensor | None = None  # of the best epoch, on the validation split
    outputs_reported: bool = False


class TrainingSession(Protocol):
    """The interface that the trainer reports to during a round.

    Every process of the job calls the methods in the same order.
    """

    @property
    def watch(self) -> Watch | None:
        """Decides when to save and when to stop; None: only at the end of an epoch."""

    def training(self, batches: Iterable[_T], epoch: int, batch: int) -> Iterable[_T]:
        """Yield the batches of ``epoch`` from number ``batch`` on, and track progress."""

    def validating(self, batches: Iterable[_T], count: int) -> Iterable[_T]:
        """Yield the ``count`` batches of an evaluation, and track progress."""

    def epoch_finished(self, result: EpochResult) -> None:
        """Log the numbers of an epoch."""

    def gamma_measured(self, when: str, epoch: int, histogram: GammaHistogram) -> None:
        """Log the distribution of γ ``before`` or ``after`` the sparse epochs."""

    def keep_predictions(self, predictions: torch.Tensor | None) -> None:
        """Record the predicted classes (N,) of the best epoch on the validation split.

        They are None for tasks without predicted classes, or if the round was resumed from a
        position that an earlier version of the program saved.
        """

    def save(self, position: Position) -> None:
        """Save the position, from which the round can resume."""


class Unattended(TrainingSession):
    """A session that logs nothing, saves nothing and never stops."""

    @property
    def watch(self) -> Watch | None:
        """None: there are no stop requests."""
        return None

    def training(self, batches: Iterable[_T], epoch: int, batch: int) -> Iterable[_T]:
        """Return ``batches``."""
        return batches

    def validating(self, batches: Iterable[_T], count: int) -> Iterable[_T]:
        """Return ``batches``."""
        return batches

    def epoch_finished(self, result: EpochResult) -> None:
        """Do nothing."""

    def gamma_measured(self, when: str, epoch: int, histogram: GammaHistogram) -> None:
        """Do nothing."""

    def keep_predictions(self, predictions: torch.Tensor | None) -> None:
        """Do nothing."""

    def save(self, position: Position) -> None:
        """Do nothing."""
