"""History of a run, in any state, as its folder describes it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from job.artifacts.accuracy import accuracy_change, score_name
from job.errors import shown
from job.training.epoch import ACCURACY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from job.artifacts.evaluation_record import RoundEvaluation
    from job.artifacts.records import EpochRecord, LatencyRecord, RoundRecord
    from job.slimming.sensitivity.record import Sensitivity


@dataclass(frozen=True)
class LayerWidth:
    """Output channels of a layer, in the slim network and in the base."""

    name: str
    kept: int
    full: int


@dataclass(frozen=True)
class MeasuredRound:
    """Sensitivity, to the removal of channels, of the network before the cut of ``round``."""

    round: int
    sensitivity: Sensitivity


@dataclass(frozen=True)
class History:
    """Contents of a run folder. ``rounds`` begins with the base; ``time`` is in Unix seconds.

    ``position`` is the round, epoch and step, ``processes`` the number of the last job. ``layers``
    describes the model of ``slim_round``, and ``measured`` the cut that made it, or else the last
    one that was measured. ``evaluations`` has those of the base and of ``slim_round``,
    ``latencies`` those of the rounds that were timed, by round. ``settings`` holds the tables of
    config.toml. ``problems`` names each unreadable file.
    """

    path: Path
    state: str = "unknown"
    exit_code: int | None = None
    time: float | None = None
    position: tuple[int, int, int] | None = None
    processes: int | None = None
    rounds: tuple[RoundRecord, ...] = ()
    epochs: tuple[EpochRecord, ...] = ()
    recommended: int | None = None
    reason: str = ""
    cautions: tuple[str, ...] = ()
    seconds: float | None = None
    layers: tuple[LayerWidth, ...] = ()
    class_names: tuple[str, ...] = ()
    measured: MeasuredRound | None = None
    evaluations: Mapping[int, RoundEvaluation] = field(default_factory=dict)
    latencies: Mapping[int, LatencyRecord] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the folder, fit for printing."""
        return shown(os.path.basename(os.path.abspath(self.path)))  # noqa: PTH100, PTH119

    @property
    def base(self) -> RoundRecord | None:
        """Round 0, once it is finished."""
        return next((entry for entry in self.rounds if entry.round == 0), None)

    @property
    def best(self) -> RoundRecord | None:
        """Round of the recommended model."""
        return next((entry for entry in self.rounds if entry.round == self.recommended), None)

    @property
    def slim_round(self) -> int | None:
        """Round that is compared with the base in detail, see the function of this name."""
        return slim_round(self.rounds, self.recommended)

    @property
    def slim_name(self) -> str:
        """Name in sentences of the model of ``slim_round``."""
        if self.recommended or not self.slim_round:
            return "the recommended model"
        return "the model of the last round"

    @property
    def most_accurate(self) -> RoundRecord | None:
        """Round of the highest accuracy, the smallest of several; None if only the base exists."""
        rounds = [entry for entry in self.rounds if entry.round]
        return max(rounds, key=lambda entry: (entry.valid_acc, -entry.params), default=None)

    @property
    def metric(self) -> str:
        """Name of the metric that chooses models, as in the keys of records."""
        records: tuple[RoundRecord | EpochRecord, ...] = (*self.rounds, *self.epochs)
        return records[0].metric if records else ACCURACY

    @property
    def score_name(self) -> str:
        """Name of the metric in sentences: ``accuracy`` for classification."""
        return score_name(self.metric)

    def setting(self, table: str, key: str) -> object:
        """Return a value of config.toml, or None."""
        return self.settings.get(table, {}).get(key)

    def points(self, entry: RoundRecord) -> float | None:
        """Return the change of accuracy from the base to ``entry`` in percentage points."""
        return accuracy_change(entry.valid_acc, self.base.valid_acc) if self.base else None

    @property
    def change(self) -> float | None:
        """Change of accuracy from the base to the recommended model in percentage points."""
        return self.points(self.best) if self.best else None

    def share(self, entry: RoundRecord, cost: str) -> float | None:
        """Return the ``cost`` of ``entry`` as a fraction of the base's."""
        whole = self.cost(self.base, cost) if self.base else None
        part = self.cost(entry, cost)
        return part / whole if whole and part is not None else None

    def cost(self, entry: RoundRecord, cost: str) -> float | None:
        """Return a cost of ``entry``; None for a ``latency`` that was not measured."""
        if cost == "latency":
            timed = self.latencies.get(entry.round)
            return timed.seconds if timed else None
        return float(getattr(entry, cost))

    def class_name(self, number: int) -> str:
        """Return the name of a class, fit for printing; its number if it has none."""
        names = self.class_names
        return shown(names[number]) if number < len(names) else str(number)


def slim_round(rounds: Sequence[RoundRecord], recommended: int | None) -> int | None:
    """Return the recommended round, or the last round if the base is recommended."""
    return rounds[-1].round if recommended == 0 and rounds else recommended
