"""The run directory on shared storage; only the main process creates a `Run`."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from job.artifacts.compatibility import check_same_run
from job.artifacts.evaluation_record import EVALUATION_FILE
from job.artifacts.json_records import from_json, to_json
from job.artifacts.model_card import RECOMMENDED, ModelCard, load_model, save_model
from job.artifacts.openmetrics import PROM_FILE, openmetrics_text
from job.artifacts.recommendation import recommend
from job.artifacts.records import (
    LATENCY_FILE,
    SENSITIVITY_FILE,
    EpochRecord,
    RoundRecord,
    StatusRecord,
    SummaryRecord,
    to_line,
)
from job.artifacts.run_config import (
    CONFIG_FILE,
    change_rounds,
    stored_base_epochs,
    stored_rounds,
    write_run_config,
)
from job.artifacts.status_file import read_status_file, write_status_file
from job.errors import (
    DataError,
    InputNotFound,
    OutputError,
    StorageError,
    cannot_begin,
    shown,
    writing,
)
from job.files import (
    append_line,
    is_file,
    read_bytes,
    read_json,
    tidy,
    write_bytes,
    write_json,
)
from job.processes import world_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from job.artifacts.evaluation_record import RoundEvaluation
    from job.artifacts.records import BaseRecord, DatasetRecord, EventRecord, LatencyRecord
    from job.config import PruneConfig
    from job.slimming.sensitivity.record import Sensitivity


class Run:
    """The files of one run. ``saved`` counts the complete rounds, the base included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.time()
        self.earlier_seconds = 0.0
        self.last_epoch: EpochRecord | None = None  # that this attempt has logged
        self.last_round: RoundRecord | None = None

    # -- the run as a whole

    def open(self, config: PruneConfig, dataset: DatasetRecord, base: BaseRecord) -> int:
        """Create the run, or resume it if its options, data and base are the same.

        Returns the number of complete rounds, the base included. Raises OutputError, InputNotFound
        (``--resume require``) or ConfigError.
        """
        if self.check(config, dataset, base):
            if stored_rounds(self.path) != config.rounds:
                if not self.complete(config):
                    self.restate_summary("finished", "running")
                change_rounds(self.path, config.rounds)
            try:
                self.earlier_seconds = float(read_json(self.path / "summary.json")["seconds"])
            except (OSError, ValueError, KeyError, TypeError):
                self.earlier_seconds = 0.0  # stopped before the first round was saved
        else:
            self._create(config, dataset, base)
        return self.saved

    def check(
        self, config: PruneConfig, dataset: DatasetRecord | None, base: BaseRecord | None
    ) -> bool:
        """Return whether there is a run to resume, without writing. Raises as ``open`` does.

        None for ``dataset`` or ``base`` skips its check.
        """
        if not is_file(self.path / CONFIG_FILE):
            if config.resume == "require":
                raise InputNotFound(f"--resume require: there is no run in {shown(self.path)}")
            return False
        if config.resume == "never":
            raise OutputError(
                f"--resume never: {shown(self.path)} already holds a run; choose another --output"
            )
        check_same_run(self.path, config, dataset, base, done=max(0, self.saved - 1))
        return True

    def _create(self, config: PruneConfig, dataset: DatasetRecord, base: BaseRecord) -> None:
        try:
            (self.path / "rounds").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_begin(self.path, error) from error
        write_run_config(self.path, config, dataset, base)

    def complete(self, config: PruneConfig) -> bool:
        """Return whether the run is finished, with no further rounds in ``config``."""
        if not self.finished_summary():
            return False
        return config.rounds in (stored_rounds(self.path), self.saved - 1)

    @property
    def base_epochs(self) -> int | None:
        """Epochs of base training of the run."""
        return stored_base_epochs(self.path)

    @property
    def seconds(self) -> float:
        """Seconds since the run began, summed over all attempts."""
        return self.earlier_seconds + time.time() - self.began

    def count_from(self, seconds: float) -> None:
        """Set the seconds of earlier attempts, up to the position that is resumed."""
        self.earlier_seconds = seconds

    def remove_unfinished(self) -> None:
        """Remove the unfinished files of a killed attempt; raises StorageError."""
        for place in ("", "rounds", "checkpoints", "figures"):
            tidy(self.path / place)

    # -- rounds/

    @property
    def saved(self) -> int:
        """Number of complete models in ``rounds/``, counted from the base without a gap."""
        count = 0
        while is_file(self.round_path(count) / "model.json"):
            count += 1
        return count

    def round_path(self, round_index: int) -> Path:
        """Return the folder of the best model of a round."""
        return self.path / "rounds" / f"{round_index:02d}"

    def save_round(
        self,
        round_index: int,
        network: nn.Module,
        card: ModelCard,
        sensitivity: Sensitivity | None = None,
        evaluation: RoundEvaluation | None = None,
        latency: LatencyRecord | None = None,
    ) -> None:
        """Write the best model of a round, its sensitivity, its evaluation, and its latency.

        Either all files are written or none. Raises StorageError.
        """
        texts = {}
        if sensitivity:
            texts[SENSITIVITY_FILE] = json.dumps(sensitivity.to_dict(), indent=1) + "\n"
        if evaluation:
            texts[EVALUATION_FILE] = evaluation.to_text()
        if latency:
            texts[LATENCY_FILE] = json.dumps(to_json(latency)) + "\n"
        save_model(self.round_path(round_index), network, card, texts)

    def load_round(self, round_index: int) -> tuple[nn.Module, ModelCard, RoundRecord]:
        """Load the best model of an earlier round; raises DataError when it is damaged."""
        network, card = load_model(self.round_path(round_index))
        try:
            entry = from_json(RoundRecord, dict(card.metrics))
            if entry.round != round_index or not (card.base and card.base.cost):
                raise ValueError("they belong to another round")
        except ValueError as error:
            raise DataError(
                f"{shown(self.round_path(round_index) / 'model.json')} does not have the numbers "
                f"of round {round_index} ({error}): restore it, or remove "
                f"{shown(self.path / 'rounds')} to start again"
            ) from error
        return network, card, entry

    # -- metrics.jsonl

    @property
    def metrics_size(self) -> int:
        """Size of metrics.jsonl in bytes."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def log(self, record: EventRecord) -> None:
        """Append one line to metrics.jsonl; raises StorageError."""
        if isinstance(record, EpochRecord):
            self.last_epoch = record
        elif isinstance(record, RoundRecord):
            self.last_round = record
        append_line(self.path / "metrics.jsonl", json.dumps(to_line(record)))

    def has_line(self, event: str, round_index: int) -> bool:
        """Return whether metrics.jsonl has an ``event`` of the round."""
        path = self.path / "metrics.jsonl"
        return path.is_file() and _line_start(event, round_index) in path.read_bytes()

    def rewind_metrics(self, saved: int, size: int | None) -> None:
        """Drop the lines of metrics.jsonl that a resumed run will write again.

        The file is truncated to ``size`` bytes, if a position gives it; otherwise after the line
        that ends round ``saved`` - 1, or after the last whole line if that line was never written.
        """
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        with writing(path):
            try:
                content = read_bytes(path)
            except ValueError as error:
                raise DataError(f"{shown(path)} cannot be a run's: {error}") from error
            keep = content.rfind(b"\n") + 1
            if size is not None and size <= keep:
                keep = size
            elif saved == 0:
                keep = 0
            else:
                start = content.rfind(_line_start(RoundRecord.EVENT, saved - 1))
                end = content.find(b"\n", start)
                keep = end + 1 if start >= 0 and end >= 0 else keep
            os.truncate(path, keep)

    # -- status.json

    @property
    def recorded_status(self) -> StatusRecord | None:
        """Status of the last job; None if there is none, or status.json is damaged."""
        return read_status_file(self.path)

    def status(
        self, state: str, exit_code: int | None, round_index: int, epoch: int, step: int
    ) -> None:
        """Replace status.json and metrics.prom; a reserve file keeps space for the last update."""
        processes = world_size() if world_size() > 1 else None
        record = StatusRecord(state, exit_code, round_index, epoch, step, time.time(), processes)
        write_status_file(self.path, record)
        text = openmetrics_text(self.path.name, record, self.last_epoch, self.last_round)
        with suppress(StorageError):  # it only repeats what other files say
            write_bytes(self.path / PROM_FILE, text.encode())

    # -- summary.json

    def finished_summary(self) -> SummaryRecord | None:
        """Return the summary of a finished run; None for a damaged one, which is written again."""
        try:
            summary = from_json(SummaryRecord, read_json(self.path / "summary.json"), lenient=True)
        except (FileNotFoundError, ValueError):
            return None
        finished = summary.state == "finished" and re.fullmatch(RECOMMENDED, summary.recommended)
        return summary if finished and summary.recommended_round < self.saved else None

    def restate_summary(self, before: str, state: str) -> None:
        """Replace the state of a summary that has the state ``before``; raises StorageError."""
        path = self.path / "summary.json"
        with suppress(OSError, ValueError):
            summary = read_json(path)
            if isinstance(summary, dict) and summary.get("state") == before:
                write_json(path, summary | {"state": state})

    def summarise(
        self,
        entries: Sequence[RoundRecord],
        state: str,
        max_drop: float | None = None,
        cautions: Sequence[str] = (),
    ) -> SummaryRecord:
        """Write summary.json from the entries of the base and the rounds, and return it."""
        recommended, reason = recommend(entries, max_drop)
        summary = SummaryRecord(
            state=state,
            base=entries[0],
            rounds=tuple(entries[1:]),
            recommended=f"rounds/{recommended:02d}",
            reason=reason,
            cautions=tuple(cautions),
            seconds=round(self.seconds, 3),
        )
        write_json(self.path / "summary.json", to_json(summary))
        return summary


def _line_start(event: str, round_index: int) -> bytes:
    """Return how the line of an ``event`` of a round begins in metrics.jsonl."""
    return f'{{"event": "{event}", "round": {round_index},'.encode()
