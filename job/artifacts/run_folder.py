"""The folder of a run: ``--output``, or the default name with the next free number."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.lock import Lock
from job.artifacts.run_config import CONFIG_FILE
from job.artifacts.run_directory import Run
from job.config import CLASSIFICATION
from job.errors import ConfigError, GammaslimError, InputNotFound, OtherRunError, shown
from job.files import is_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.artifacts.records import BaseRecord, DatasetRecord
    from job.config import PruneConfig

# names of factories that say nothing about the model
GENERIC_FACTORIES = (
    "create",
    "create_model",
    "build",
    "build_model",
    "get_model",
    "make_model",
    "model",
)
BEGINNING = 10.0  # seconds within which a job that holds the lock writes its config.toml


def choose_run_folder(
    config: PruneConfig, dataset: DatasetRecord | None, base: BaseRecord | None
) -> tuple[Path, str]:
    """Return the run folder of a command, and why it is not the first of its name, or "".

    Without ``--output`` the folder is ``runs/MODEL-DATA``, possibly with a number: the one whose
    run has these options, ``dataset`` and ``base`` (None matches any), else the next free one. A
    run under the name that an earlier version gave it is resumed. Raises ConfigError, or
    InputNotFound (``--resume require``).
    """
    if config.output:
        return Path(config.output), ""
    first = default_output(config)
    others: list[OtherRunError] = []
    for path in _existing(first) if config.resume != "never" else ():
        if not is_file(path / CONFIG_FILE):
            continue
        try:
            Run(path).check(config, dataset, base)
        except OtherRunError as error:
            others.append(error)
        else:
            return path, _first_difference(others)
    if config.resume != "never" and _holds_run_of(_earlier_output(config), config, dataset, base):
        return _earlier_output(config), ""
    if config.resume == "require":
        missing = InputNotFound(f"--resume require: there is no run in {shown(first)}")
        raise others[0] if others else missing
    free = next(path for path in _candidates(first) if not is_file(path / CONFIG_FILE))
    return free, _first_difference(others)


def _holds_run_of(
    path: Path,
    config: PruneConfig,
    dataset: DatasetRecord | None,
    base: BaseRecord | None,
) -> bool:
    with suppress(ConfigError):
        return is_file(path / CONFIG_FILE) and Run(path).check(config, dataset, base)
    return False


def _earlier_output(config: PruneConfig) -> Path:
    """Return the default name of earlier versions, without ``--model-arg`` and number."""
    data = Path(config.data).absolute().name if config.data else "fashion-mnist"
    return Path("runs") / f"{config.model.replace(':', '-')}-{data}"


def likely_run_folder(config: PruneConfig) -> Path:
    """Return the likely run folder before the data are known, for the STOP file."""
    try:
        return choose_run_folder(config, None, None)[0]
    except GammaslimError:  # reported later
        return Path(config.output) if config.output else default_output(config)


def await_config(run: Path) -> None:
    """Wait until the job that has just taken ``run`` has written its config.toml."""
    began = time.monotonic()
    while not is_file(run / CONFIG_FILE) and Lock(run).alive():
        if time.monotonic() - began > BEGINNING:
            return
        time.sleep(0.1)


def _candidates(first: Path) -> Iterator[Path]:
    yield first
    number = 2
    while True:
        yield first.with_name(f"{first.name}-{number}")
        number += 1


def _existing(first: Path) -> list[Path]:
    """Return the existing folders of that name in the order of their numbers."""
    name = re.compile(re.escape(first.name) + r"(?:-([2-9]|[1-9][0-9]{1,5}))?")
    try:
        paths = {name.fullmatch(path.name): path for path in first.parent.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = sorted((int(match[1] or 1), path) for match, path in paths.items() if match)
    return [path for _, path in matches]


def _first_difference(others: list[OtherRunError]) -> str:
    return others[0].difference if others else ""


def default_output(config: PruneConfig) -> Path:
    """Return ``runs/MODEL-DATA``, so that the same command resumes its run."""
    return Path("runs") / default_run_name(config)


def default_run_name(config: PruneConfig) -> str:
    """Return MODEL with its arguments, and DATA: ``timm-resnet18-photos`` for timm:create_model."""
    module, _, factory = config.model.partition(":")
    texts = [value for _, value in config.model_arg if isinstance(value, str)]
    rest = [f"{k}={json.dumps(v)}" for k, v in config.model_arg if not isinstance(v, str)]
    parts = [module, "" if texts and factory in GENERIC_FACTORIES else factory, *texts, *rest]
    data = os.path.basename(os.path.abspath(config.data)) if config.data else _default_data(config)  # noqa: PTH100, PTH119
    name = re.sub(r"[^\w.=+-]+", "-", "-".join(part for part in parts if part))
    return f"{name[:120]}-{data}" if data else name[:120]


def _default_data(config: PruneConfig) -> str:
    """Return the name of the data without --data: the built-in ones, or those of a task."""
    return "fashion-mnist" if config.task == CLASSIFICATION else config.task.replace(":", "-")
