"""The position within a round that training can resume from: all that a checkpoint holds.

A value is checkpointed by being a field of `TrainingProgress`, which the trainer fills in and
restores, or of `RoundProgress`, which the session does. Give it a default: checkpoints of earlier
versions do not have it.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  (the types are read to load a checkpoint)
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.slimming.planning.layer_channels import LayerChannels  # noqa: TC001
from job.training.epoch import EpochResult  # noqa: TC001

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainingProgress:
    """Where the training of a round is, apart from tensors."""

    processes: int
    seconds: float  # spent on the epoch so far
    best: EpochResult | None  # the best epoch so far
    scaler: Mapping[str, Any] | None = None  # state of the gradient scaler of fp16


@dataclass(frozen=True)
class CutRecord:
    """The cut that began a round: channels kept, indices into the base; ``wide`` is a SHA-256."""

    wide: str
    width: float
    layers: Mapping[str, LayerChannels]


@dataclass(frozen=True)
class PrunedScores:
    """Scores of a network between surgery and fine-tuning; none for the base."""

    valid_acc_pruned: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoundProgress:
    """Where the run is.

    ``step`` counts optimizer steps since the run began, ``metrics_size`` is the size of
    metrics.jsonl in bytes. The seconds are those spent on the round and on the run.
    """

    step: int = 0
    scores: PrunedScores
    plan: CutRecord
    metrics_size: int
    round_seconds: float
    run_seconds: float


@dataclass(frozen=True)
class Position:
    """A point within a round: the next batch of an epoch, and what the rest depends on.

    ``run`` is None until the session has filled it in.
    """

    round: int
    epoch: int
    batch: int
    training: TrainingProgress
    tensors: dict[str, torch.Tensor]
    run: RoundProgress | None = None

    @property
    def name(self) -> str:
        """Name of the checkpoint folder: names sort as positions do."""
        return f"{self.round:03d}-{self.epoch:04d}-{self.batch:07d}"

    @property
    def progress(self) -> RoundProgress:
        """Where the run was when this position was saved."""
        assert self.run
        return self.run
