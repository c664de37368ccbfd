"""The run directory on shared storage; only the main process makes one of these."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from job.artifacts.accuracy import change, signed
from job.artifacts.compatibility import check_unchanged, other_run
from job.artifacts.model_card import RECOMMENDED, ModelCard, load_model, save_model
from job.artifacts.versions import versions
from job.config import MAX_DROP, PruneConfig
from job.errors import (
    ConfigError,
    DataError,
    InputNotFound,
    OtherRunError,
    OutputError,
    StorageError,
    cannot_begin,
    shown,
    writing,
)
from job.files import (
    append_line,
    is_file,
    parse_toml,
    read_bytes,
    read_json,
    remove,
    tidy,
    toml_text,
    write_bytes,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

# what a round's entry has at least
ENTRY = ("round", "step", "width", "channels", "params", "macs", "bytes", "valid_acc", "valid_loss")
RESERVE = 8192  # bytes kept so that a full disk still takes the last status


class Run:
    """One run's files. ``saved`` says how many rounds, the base included, are complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.time()
        self.earlier_seconds = 0.0

    @property
    def saved(self) -> int:
        """Complete models in ``rounds/``, counted from the base without a gap."""
        count = 0
        while is_file(self.round_path(count) / "model.json"):
            count += 1
        return count

    def round_path(self, round_: int) -> Path:
        """Where the best model of a round lies."""
        return self.path / "rounds" / f"{round_:02d}"

    def open(self, config: PruneConfig, dataset: Mapping[str, Any], base: Mapping[str, Any]) -> int:
        """Create the run, or resume it where its options, data and base are the same.

        Returns how many rounds are complete, the base included.

        Raises OutputError, InputNotFound (``--resume require``) or ConfigError.
        """
        if self.check(config, dataset, base):
            if self.stored_rounds != config.rounds:
                self._change_rounds(config)
            try:
                self.earlier_seconds = float(read_json(self.path / "summary.json")["seconds"])
            except (OSError, ValueError, KeyError, TypeError):
                self.earlier_seconds = 0.0  # stopped before the first round was saved
        else:
            self._create(config, dataset, base)
        return self.saved

    def check(
        self,
        config: PruneConfig,
        dataset: Mapping[str, Any] | None,
        base: Mapping[str, Any] | None,
    ) -> bool:
        """Whether there is a run to resume; writes nothing. Raises as ``open`` does.

        ``dataset`` or ``base`` None: any will do.
        """
        stored = self.path / "config.toml"
        if is_file(stored):
            self._check_resume(stored, config, dataset, base)
            return True
        if config.resume == "require":
            raise InputNotFound(f"--resume require: there is no run in {shown(self.path)}")
        return False

    def _create(
        self, config: PruneConfig, dataset: Mapping[str, Any], base: Mapping[str, Any]
    ) -> None:
        tables = {"prune": config.to_dict(), "dataset": dataset, "base": base}
        tables["versions"] = versions()
        try:
            (self.path / "rounds").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_begin(self.path, error) from error
        write_bytes(self.path / "config.toml", toml_text(tables).encode())

    def _check_resume(
        self,
        stored: Path,
        config: PruneConfig,
        dataset: Mapping[str, Any] | None,
        base: Mapping[str, Any] | None,
    ) -> None:
        if config.resume == "never":
            raise OutputError(
                f"--resume never: {shown(self.path)} already holds a run; choose another --output"
            )
        try:
            tables = parse_toml(read_bytes(stored).decode())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{shown(stored)} cannot be read: {error}") from error
        if not all(isinstance(tables.get(name, {}), dict) for name in ("prune", "dataset")):
            raise ConfigError(
                f"{shown(stored)} is not the config.toml of a run: a table is missing"
            )
        done = max(0, self.saved - 1)
        origin = self._other_origin(tables, config, dataset, base)
        try:
            check_unchanged(tables.get("prune", {}), config, shown(self.path), done)
        except OtherRunError:
            raise
        except ConfigError as fewer:  # fewer rounds: of another run they may be
            raise origin or fewer from None
        if origin:
            raise origin

    def _other_origin(
        self,
        tables: Mapping[str, Any],
        config: PruneConfig,
        dataset: Mapping[str, Any] | None,
        base: Mapping[str, Any] | None,
    ) -> OtherRunError | None:
        """What is wrong with resuming this run on ``dataset`` from ``base``; None: any will do."""
        fingerprint = tables.get("dataset", {}).get("fingerprint")
        if dataset is not None and fingerprint != dataset["fingerprint"]:
            return other_run(
                f"{shown(self.path)} was begun on other data", ": type the same --data to resume it"
            )
        own = tables.get("base")
        if base is not None and config.base_epochs is None and isinstance(own, dict):
            base = {**base, "epochs": own.get("epochs")}  # the default when the run was begun
        if base is not None and own != dict(base):
            return other_run(
                f"{shown(self.path)} was begun from other --weights, --base-epochs or --teacher",
                ": type the same to resume it",
            )
        return None

    @property
    def stored_rounds(self) -> Any:
        """``--rounds`` as the run has it now."""
        return self._stored("prune", "rounds", PruneConfig.rounds)

    @property
    def base_epochs(self) -> int | None:
        """Epochs of base training of the run, by the default of the version that began it too."""
        epochs = self._stored("base", "epochs", None)
        return epochs if type(epochs) is int and epochs >= 0 else None

    def _stored(self, table: str, key: str, default: Any) -> Any:
        """A value of config.toml; None where that cannot be read."""
        try:
            tables = parse_toml(read_bytes(self.path / "config.toml").decode())
            return tables[table].get(key, default)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _change_rounds(self, config: PruneConfig) -> None:
        """Let the run have ``--rounds`` of ``config``; it is no longer finished then."""
        if not self.complete(config):
            self.restate_summary("finished", "running")
        tables = parse_toml(read_bytes(self.path / "config.toml").decode())
        tables["prune"]["rounds"] = config.rounds
        write_bytes(self.path / "config.toml", toml_text(tables).encode())

    def complete(self, config: PruneConfig) -> bool:
        """Whether the run is finished, with no further rounds in ``config``."""
        if not self.finished_summary():
            return False
        return config.rounds in (self.stored_rounds, self.saved - 1)

    @property
    def seconds(self) -> float:
        """How long this run has taken, earlier attempts included."""
        return self.earlier_seconds + time.time() - self.began

    @property
    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def remove_unfinished(self) -> None:
        """Clear away what a killed attempt left half done; raises StorageError."""
        for place in ("", "rounds", "checkpoints", "figures"):
            tidy(self.path / place)

    def rewind_metrics(self, saved: int, size: int | None) -> None:
        """Drop the lines of metrics.jsonl that a resumed run will write again.

        What stays is the file up to ``size``, where a position says so; otherwise up to the line
        that ends round ``saved`` - 1, or all whole lines when that one was not written any more.
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
                mark = f'{{"event": "round", "round": {saved - 1},'.encode()
                end = content.find(b"\n", content.rfind(mark))
                keep = end + 1 if mark in content and end >= 0 else keep
            os.truncate(path, keep)

    def has_line(self, event: str, round_: int) -> bool:
        """Whether metrics.jsonl has an ``event`` of ``round_``."""
        mark = f'{{"event": "{event}", "round": {round_},'
        path = self.path / "metrics.jsonl"
        return path.is_file() and mark.encode() in path.read_bytes()

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        append_line(self.path / "metrics.jsonl", json.dumps(dict(event)))

    def status(self, state: str, exit_code: int | None, round_: int, epoch: int, step: int) -> None:
        """Replace status.json; room for the last one is kept while the run lasts."""
        path, reserve = self.path / "status.json", self.path / ".reserve"
        at = {"round": round_, "epoch": epoch, "step": step}
        content = {"state": state, "exit_code": exit_code, **at, "time": time.time()}
        if state == "running":
            if not is_file(reserve):
                write_bytes(reserve, os.urandom(RESERVE))  # no file system stores this smaller
            return write_json(path, content)
        try:
            write_json(path, content)
        except StorageError:
            remove(reserve)
            write_json(path, content)
        remove(reserve)
        return None

    @property
    def state(self) -> str | None:
        """What status.json says of the run."""
        try:
            return str(read_json(self.path / "status.json")["state"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def restate_summary(self, before: str, state: str) -> None:
        """Have a summary that says ``before`` say ``state``; raises StorageError."""
        path = self.path / "summary.json"
        with suppress(OSError, ValueError):
            summary = read_json(path)
            if isinstance(summary, dict) and summary.get("state") == before:
                write_json(path, summary | {"state": state})

    def save_round(self, round_: int, network: nn.Module, card: ModelCard) -> None:
        """Write the best model of a round; complete or not at all."""
        save_model(self.round_path(round_), network, card)

    def load_round(self, round_: int) -> tuple[nn.Module, ModelCard]:
        """The best model of an earlier round; raises DataError when it is damaged."""
        network, card = load_model(self.round_path(round_))
        numbers = (card.metrics.get(key) for key in ENTRY)
        known = all(type(n) in (int, float) for n in numbers) and card.base and card.base.cost
        if card.metrics.get("round") != round_ or not known:
            raise DataError(
                f"{shown(self.round_path(round_) / 'model.json')} has not the numbers of round "
                f"{round_}: restore it, or remove {shown(self.path / 'rounds')} to start again"
            )
        return network, card

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a run that is finished already; a damaged one is written anew."""
        try:
            summary: dict[str, Any] = read_json(self.path / "summary.json")
            chosen, seconds = str(summary["recommended"]), summary["seconds"]
            whole = summary["state"] == "finished" and re.fullmatch(RECOMMENDED, chosen)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        whole = whole and type(seconds) in (int, float) and int(chosen[7:]) < self.saved
        return {"reason": "", "cautions": [], **summary} if whole else None

    def summarise(
        self,
        entries: Sequence[Mapping[str, Any]],
        state: str,
        max_drop: float | None = None,
        cautions: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Write summary.json from the base's and the rounds' entries, and return it."""
        recommended, reason = recommend(entries, max_drop)
        summary = {
            "format": 1,
            "state": state,
            "base": dict(entries[0]),
            "rounds": [dict(entry) for entry in entries[1:]],
            "recommended": f"rounds/{recommended:02d}",
            "reason": reason,
            "cautions": list(cautions),
            "seconds": round(self.seconds, 3),
        }
        write_json(self.path / "summary.json", summary)
        return summary


def drop(entries: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> float:
    """Points of validation accuracy that ``entry`` lies below the base, first of ``entries``."""
    return 0.0 - change(entry["valid_acc"], entries[0]["valid_acc"])


def recommend(
    entries: Sequence[Mapping[str, Any]], max_drop: float | None = None
) -> tuple[int, str]:
    """The round to use and why: the smallest whose validation accuracy is near the base's.

    ``max_drop`` in points; MAX_DROP where it was not asked for.
    """
    limit = MAX_DROP if max_drop is None else max_drop
    points = f"{limit:g} point" + ("" if limit == 1 else "s")
    points += "" if max_drop is None else " (--max-drop)"
    near = [entry for entry in entries if drop(entries, entry) <= limit]
    chosen = min(near, key=lambda entry: (entry["params"], entry["round"]))
    if chosen["round"] == 0:
        if len(entries) == 1:
            return 0, "the base: no round is finished"
        return 0, f"the base: every round falls more than {points} below it"
    gain = signed(change(chosen["valid_acc"], entries[0]["valid_acc"]))
    return chosen["round"], (
        f"the fewest parameters within {points} of the base: "
        f"{chosen['params'] / entries[0]['params']:.1%} of them, accuracy {gain} points"
    )
