"""Check whether a command can resume a run: options that may differ, and the error message."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from job.artifacts.json_records import to_json
from job.artifacts.run_config import CONFIG_FILE, read_run_config
from job.config import OPTION_DEFAULTS, PruneConfig, policy_for
from job.console import counted
from job.errors import ConfigError, OtherRunError, shown
from job.options import options_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from job.artifacts.records import BaseRecord, DatasetRecord
    from job.artifacts.run_config import Tables


def check_same_run(
    run: Path,
    config: PruneConfig,
    dataset: DatasetRecord | None,
    base: BaseRecord | None,
    done: int,
) -> None:
    """Check that ``run`` was begun with these options, data and base; ``done`` rounds are complete.

    None for ``dataset`` or ``base`` skips its check. Other weights are reported before any option:
    a slim model in ``--weights`` brings options that nobody typed. Raises OtherRunError or
    ConfigError.
    """
    path = run / CONFIG_FILE
    try:
        tables = read_run_config(run)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown(path)} cannot be read: {error}") from error
    if base is not None and (other := _other_weights(shown(run), tables, config, base)):
        raise other
    origin = _other_origin(shown(run), tables, config, dataset, base)
    try:
        check_unchanged(tables.get("prune", {}), config, shown(run), done)
    except OtherRunError:
        raise
    except ConfigError as fewer:  # fewer rounds than are complete; report another origin first
        raise origin or fewer from None
    if origin:
        raise origin


def _other_weights(
    run: str, tables: Tables, config: PruneConfig, base: BaseRecord
) -> OtherRunError | None:
    """Return the error for a run that was begun from other weights, or None."""
    stored = tables.get("base")
    if stored is None or stored.get("weights_sha256") == base.weights_sha256:
        return None
    began = tables.get("prune", {}).get("weights")
    if began == config.weights:
        return other_run_error(
            f"{run} was begun with other content of {option_text('weights', began)}",
            ": restore it to resume the run",
        )
    options = [option_text("weights", began)]
    return other_run_error(
        _difference(run, options, [option_text("weights", config.weights)]),
        f": {_advice(options)} to resume it",
    )


def _other_origin(
    run: str,
    tables: Tables,
    config: PruneConfig,
    dataset: DatasetRecord | None,
    base: BaseRecord | None,
) -> OtherRunError | None:
    """Return the error for a run that was begun on other data or with another teacher, or None."""
    fingerprint = tables.get("dataset", {}).get("fingerprint")
    if dataset is not None and fingerprint != dataset.fingerprint:
        return other_run_error(
            f"{run} was begun on other data", ": type the same --data to resume it"
        )
    began = tables.get("dataset", {}).get("max_side")
    if dataset is not None and began != dataset.max_side:
        texts = [option_text("cache_max_side", side) for side in (began, dataset.max_side)]
        return other_run_error(
            _difference(run, texts[:1], texts[1:]), f": {_advice(texts[:1])} to resume it"
        )
    if base is None:
        return None
    stored, present = tables.get("base"), to_json(base)
    if config.base_epochs is None and stored is not None:
        present["epochs"] = stored.get("epochs")  # the default when the run was begun
    if stored == present:
        return None
    options = {
        "weights_sha256": "--weights", "epochs": "--base-epochs", "teacher_sha256": "--teacher",
    }  # fmt: skip
    begun = stored or {}
    other = _list([text for name, text in options.items() if begun.get(name) != present.get(name)])
    return other_run_error(f"{run} was begun with another {other}", ": type the same to resume it")


def check_unchanged(stored: Mapping[str, Any], now: PruneConfig, run: str, done: int) -> None:
    """Check that the options in ``now`` that change the result are those of the run.

    ``stored`` holds the options of the run, ``done`` counts its complete rounds. The number of
    rounds can grow if no earlier round depends on it. Raises OtherRunError for another value of an
    option, ConfigError for fewer rounds than are complete.
    """
    changed = _changed(stored, now)
    if changed == ["rounds"] and not now.target:
        if now.last_round is not None and now.last_round < done:
            raise ConfigError(
                f"{run} has {counted(done, 'round')} already, --rounds {now.rounds} is fewer: "
                f"type --rounds {done} or more to continue it, or choose another --output"
            )
        return
    if not changed:
        return
    present = now.to_dict()
    began = [option_text(name, _stored_value(stored, name)) for name in changed]
    here = [option_text(name, present.get(name)) for name in changed]
    more = ""
    if changed == ["rounds"]:
        more = (
            f" (--target {now.target} is spread over the rounds: the earlier ones would differ; "
            f"to cut further, --weights {run} with another --target)"
        )
    raise other_run_error(_difference(run, began, here), f"{more}: {_advice(began)} to resume it")


def _difference(run: str, began: list[str], here: list[str]) -> str:
    return f"{run} was begun {_list(_stated(began))}, this command is {_list(_stated(here))}"


def other_run_error(difference: str, advice: str) -> OtherRunError:
    """Return the error that states ``difference`` and then, as ``advice``, what to type."""
    return OtherRunError(
        f"{difference}{advice}, or choose another --output for a new run", difference
    )


def _changed(stored: Mapping[str, Any], now: PruneConfig) -> list[str]:
    present = now.to_dict()
    changed = [
        name
        for name, option in options_of(PruneConfig).items()
        if option.changes_result and _stored_value(stored, name) != present.get(name)
    ]
    by_default = now.policy is None and stored.get("policy") == policy_for(stored.get("target"))
    if {"target", "policy"} <= set(changed) and by_default:
        changed.remove("policy")  # it follows from the target
    return changed


def _stored_value(stored: Mapping[str, Any], name: str) -> object:
    """Return an option of the run; the default if its version did not have the option."""
    return stored.get(name, OPTION_DEFAULTS.get(name))


def option_text(name: str, value: object) -> str:
    """Return an option as it is typed: ``--target macs=0.5``; ``no --target`` without a value."""
    option = "--" + name.replace("_", "-")
    if value is None or value is False or value == []:
        return f"no {option}"
    if value is True:
        return option
    if isinstance(value, list) and name == "model_arg":
        return " ".join(f"{option} {shlex.quote(str(item))}" for item in value)
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return f"{option} {shlex.quote(str(value))}"


def _stated(options: list[str]) -> list[str]:
    return [f"with {option}".replace("with no ", "without ") for option in options]


def _advice(options: list[str]) -> str:
    """Return what to type and what to leave out for these options."""
    given = [option for option in options if not option.startswith("no ")]
    left_out = [option.removeprefix("no ") for option in options if option.startswith("no ")]
    parts = [f"type {' '.join(given)}"] * bool(given)
    return _list([*parts, *[f"leave out {_list(left_out)}"] * bool(left_out)])


def _list(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
