"""The position within a round that training can resume from: the content of a checkpoint.

To checkpoint a value, add a field to `TrainingProgress`, which the trainer fills in and restores,
or to `RoundProgress`, for which the session does. Give the field a default: checkpoints of
earlier versions lack it.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  (the types are read to load a checkpoint)
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.slimming.planning.layer_channels import LayerChannels  # noqa: TC001
from job.slimming.sensitivity.record import Sensitivity  # noqa: TC001
from job.training.epoch import EpochResult  # noqa: TC001

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of training within a round, except for tensors."""

    processes: int
    seconds: float  # spent on the epoch so far
    best: EpochResult | None  # the best epoch so far
    scaler: Mapping[str, Any] | None = None  # state of the gradient scaler of fp16


@dataclass(frozen=True)
class CutRecord:
    """The cut of a round: the kept channels as indices into the base.

    ``wide`` is the SHA-256 of the network before the cut.
    """

    wide: str
    width: float
    layers: Mapping[str, LayerChannels]


@dataclass(frozen=True)
class PrunedScores:
    """Scores of a network between surgery and fine-tuning; empty for the base.

    ``valid_acc_recovered`` is None without recovery.
    """

    valid_acc_pruned: float | None = None
    valid_acc_recovered: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoundProgress:
    """The progress of the run.

    ``step`` counts optimizer steps since the run began, ``metrics_size`` is the size of
    metrics.jsonl in bytes. The seconds are spent on the round and on the run. ``sensitivity`` is
    what the cut of the round measured, if it did.
    """

    step: int = 0
    scores: PrunedScores
    plan: CutRecord
    metrics_size: int
    round_seconds: float
    run_seconds: float
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True)
class Position:
    """A point within a round: the next batch of an epoch, and the training state.

    ``run`` is None until the session fills it in.
    """

    round: int
    epoch: int
    batch: int
    training: TrainingProgress
    tensors: dict[str, torch.Tensor]
    run: RoundProgress | None = None

    @property
    def name(self) -> str:
        """Name of the checkpoint folder; names sort in the order of positions."""
        return f"{self.round:03d}-{self.epoch:04d}-{self.batch:07d}"

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors whose names begin with ``name`` and a dot, without these."""
        prefix, tensors = f"{name}.", self.tensors.items()
        return {k.removeprefix(prefix): v for k, v in tensors if k.startswith(prefix)}

    @property
    def progress(self) -> RoundProgress:
        """The progress of the run when this position was saved."""
        assert self.run
        return self.run
