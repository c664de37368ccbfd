"""Records of a run directory, shared by the code that writes its files and that reads them.

=====================  =====================================================
file                   record
=====================  =====================================================
``status.json``        `StatusRecord`
``lock.json``          `LockRecord`
``summary.json``       `SummaryRecord`, which holds a `RoundRecord` a round
``metrics.jsonl``      a line each, `to_line`: `EpochRecord`, `RoundRecord`,
                       `SlimRecord`, `GammaRecord`, `StopRecord`,
                       `ResumeRecord`
``position.json``      `TrainingProgress` and `RoundProgress`, in
                       `job.training.checkpoint_content`
``model.json``         `Lineage`; the rest is `job.artifacts.model_card`'s
``sensitivity.json``   `Sensitivity`, in `job.slimming.sensitivity.record`
``latency.json``       `LatencyRecord`
``evaluation.json``    `RoundEvaluation`, in
                       `job.artifacts.evaluation_record`
``config.toml``        `DatasetRecord`, `BaseRecord`
``wandb.json``         `WandbRecord`
``mlflow.json``        `MlflowRecord`
=====================  =====================================================

To add a summary metric, add a field to `RoundRecord` and the line that computes it. The field needs
a default, because older files lack it. Keys keep their names and order: scripts rely on them.
Scores of another task than classification have the name of its metric in place of ``acc``, as in
``valid_miou``; the record then has the key ``metric``.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  (from_json reads the types)
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from job.artifacts.json_records import to_json
from job.training.epoch import ACCURACY, BRIEF, EpochResult

if TYPE_CHECKING:
    from job.files import JsonObject

LATENCY_FILE = "latency.json"  # next to the model.json of a round that was timed
SENSITIVITY_FILE = "sensitivity.json"  # next to the model.json of a round that measured it


@dataclass(frozen=True)
class PlannedRound:
    """Costs of the base (round 0) or of a round; ``width`` is a fraction of the base's.

    ``channels`` counts those with a BatchNorm, ``bytes`` the whole state dict; ``macs`` are the
    multiply-adds for one image.
    """

    round: int
    width: float
    channels: int
    params: int
    macs: int
    bytes: int

    @property
    def name(self) -> str:
        """Its number, or "base"."""
        return "base" if self.round == 0 else str(self.round)


@dataclass(frozen=True, kw_only=True)
class RoundRecord(PlannedRound):
    """Costs and scores of the base's or a round's best model. Accuracies are fractions.

    ``valid_acc_pruned`` is the accuracy after surgery, before fine-tuning, and
    ``valid_acc_recovered`` that after recovery, if there is any. ``step`` counts optimizer steps
    since the run began, ``seconds`` is the time that the round took. ``latency`` is the median
    time of the network for one image on the device of the run, in seconds, and ``speedup`` says
    how many times as fast as the base it is: they were timed in turn, and the latency is the base's
    divided by the speed-up. It is from ``speedup_low`` to ``speedup_high`` (95 %).
    """

    EVENT: ClassVar[str] = "round"

    valid_acc_pruned: float | None = field(default=None, metadata={"key": "valid_{metric}_pruned"})
    valid_acc_recovered: float | None = field(
        default=None, metadata={"key": "valid_{metric}_recovered"}
    )
    valid_acc: float = field(metadata={"key": "valid_{metric}"})
    valid_loss: float
    best_epoch: int | None = None
    train_acc: float | None = field(default=None, metadata={"key": "train_{metric}"})
    cautions: tuple[str, ...] = ()
    step: int
    seconds: float | None = None
    latency: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    metric: str = field(default=ACCURACY, metadata=BRIEF)
    metrics: Mapping[str, float] = field(default_factory=dict, metadata=BRIEF)


@dataclass(frozen=True, kw_only=True)
class EpochRecord(EpochResult):
    """The numbers of an epoch, and the width and costs of the network that was trained."""

    EVENT: ClassVar[str] = "epoch"

    width: float
    params: int
    macs: int


@dataclass(frozen=True)
class SlimRecord:
    """Accuracy and loss after surgery, and the relative error of the verification of a cut.

    With recovery, also the accuracy and loss after it.
    """

    EVENT: ClassVar[str] = "slim"

    round: int
    width: float
    valid_acc_pruned: float = field(metadata={"key": "valid_{metric}_pruned"})
    valid_loss_pruned: float
    verification_error: float
    valid_acc_recovered: float | None = field(
        default=None, metadata={"key": "valid_{metric}_recovered"}
    )
    valid_loss_recovered: float | None = None
    metric: str = field(default=ACCURACY, metadata=BRIEF)


@dataclass(frozen=True)
class LatencyRecord:
    """Measured time of a model: median ``seconds`` of a batch of ``batch_size`` images.

    Times of one run are compared with each other, so they come from one ``device``.
    """

    seconds: float
    batch_size: int = 1
    device: str = ""


@dataclass(frozen=True)
class GammaRecord:
    """Histogram of |γ|; ``when`` is "before" or "after" the sparse epochs.

    ``bins`` are counts of equal bins from 0 to ``max``; ``zeros`` of the ``count`` values are 0.
    """

    EVENT: ClassVar[str] = "gamma"

    round: int
    epoch: int
    when: str
    count: int
    zeros: int
    max: float
    bins: tuple[int, ...]


@dataclass(frozen=True)
class StopRecord:
    """End of an attempt before the run is finished; ``error`` is the message that it printed."""

    EVENT: ClassVar[str] = "stop"

    state: str
    exit_code: int
    error: str | None = None


@dataclass(frozen=True)
class ResumeRecord:
    """Position at which an attempt resumes, and the numbers of processes now and before."""

    EVENT: ClassVar[str] = "resume"

    round: int
    epoch: int
    batch: int
    processes: int
    processes_before: int | None


EventRecord = EpochRecord | RoundRecord | SlimRecord | GammaRecord | StopRecord | ResumeRecord


def to_line(record: EventRecord) -> JsonObject:
    """Return the line of metrics.jsonl for ``record``: the name of the event comes first."""
    return {"event": record.EVENT, **to_json(record)}


@dataclass(frozen=True)
class StatusRecord:
    """State and position of a run; ``time`` is in Unix seconds.

    ``processes`` is their number; None for a single one.
    """

    state: str
    exit_code: int | None
    round: int
    epoch: int
    step: int
    time: float
    processes: int | None = None

    @property
    def at(self) -> tuple[int, int, int]:
        """Round, epoch and step."""
        return self.round, self.epoch, self.step


@dataclass(frozen=True)
class LockRecord:
    """Process that holds a run; ``boot`` and ``processes`` identify its PID namespace.

    ``started``, in ticks since boot, distinguishes processes that reuse a PID.
    """

    id: str
    host: str
    boot: str
    processes: str
    pid: int
    started: str | None


@dataclass(frozen=True, kw_only=True)
class SummaryRecord:
    """Base, rounds, and the recommended model with the reason."""

    WRITE_DEFAULTS: ClassVar[bool] = True

    format: int = 1
    state: str
    base: RoundRecord
    rounds: tuple[RoundRecord, ...]
    recommended: str  # rounds/NN
    reason: str = ""
    cautions: tuple[str, ...] = ()
    seconds: float

    @property
    def entries(self) -> tuple[RoundRecord, ...]:
        """The base and the rounds."""
        return self.base, *self.rounds

    @property
    def recommended_round(self) -> int:
        """Number of the recommended round."""
        return int(self.recommended.rpartition("/")[2])


@dataclass(frozen=True)
class Lineage:
    """Origin of a model. Hashes are SHA-256 of state dicts; ``from_`` is the origin of a slim base.

    ``listing`` is the version of the rules that list the files of a data set.
    """

    base_sha256: str | None = None
    seed: int | None = None
    listing: int | None = None
    fresh_classifier: bool = False
    base_weights: str | None = None
    from_: Lineage | None = None
    run: str | None = None
    round: int | None = None
    wide_sha256: str | None = None
    slimmed_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """Data set of a run, which can only be resumed with the same ``fingerprint``."""

    layout: str
    root: str
    listing: int
    path: str | None = None  # as given, absolute; None for the built-in data
    training: int
    validation: int
    testing: int = 0  # with targets
    skipped: tuple[str, ...]
    max_side: int | None = None  # of the images, if --cache-max-side reduces any
    fingerprint: str


@dataclass(frozen=True)
class BaseRecord:
    """Origin of the base of a run, which can only be resumed from the same base."""

    weights_sha256: str
    epochs: int
    teacher_sha256: str | None = None


@dataclass(frozen=True)
class WandbRecord:
    """Id of the W&B run, attempts so far, and the folders of W&B that are not synced yet."""

    WRITE_DEFAULTS: ClassVar[bool] = True

    id: str = ""
    attempts: int = 0
    unsent: tuple[str, ...] = ()


@dataclass(frozen=True)
class MlflowRecord:
    """Id of the MLflow run that all attempts of a run share."""

    WRITE_DEFAULTS: ClassVar[bool] = True

    id: str = ""
