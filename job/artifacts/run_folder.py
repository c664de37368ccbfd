"""Which folder a run is in: --output, or the default name with the next free number."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.lock import Lock
from job.artifacts.run_directory import Run
from job.errors import ConfigError, GammaslimError, InputNotFound, OtherRunError, shown
from job.files import is_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.artifacts.records import BaseRecord, DatasetRecord
    from job.config import PruneConfig

GENERIC = ("create", "create_model", "build", "build_model", "get_model", "make_model", "model")
BEGINNING = 10.0  # seconds that a job has from its lock to its config.toml


def choose(
    config: PruneConfig, dataset: DatasetRecord | None, base: BaseRecord | None
) -> tuple[Path, str]:
    """The run folder of a command, and why it is not the first of its name, or "".

    Without ``--output`` it is ``runs/MODEL-DATA``, or that with a number: the one whose run is of
    these options, ``dataset`` and ``base`` (None: whatever they are), else the next that has none.
    A run that an earlier version named otherwise is resumed. Raises ConfigError, or InputNotFound
    (``--resume require``).
    """
    if config.output:
        return Path(config.output), ""
    first = default_output(config)
    others: list[OtherRunError] = []
    for path in _numbered(first) if config.resume != "never" else ():
        if not is_file(path / "config.toml"):
            continue
        try:
            Run(path).check(config, dataset, base)
        except OtherRunError as error:
            others.append(error)
        else:
            return path, _reason(others)
    if config.resume != "never" and _is_of(_earlier_output(config), config, dataset, base):
        return _earlier_output(config), ""
    if config.resume == "require":
        raise (
            others[0]
            if others
            else InputNotFound(f"--resume require: there is no run in {shown(first)}")
        )
    return next(path for path in _numbers(first) if not is_file(path / "config.toml")), _reason(
        others
    )


def _is_of(
    path: Path,
    config: PruneConfig,
    dataset: DatasetRecord | None,
    base: BaseRecord | None,
) -> bool:
    with suppress(ConfigError):
        return is_file(path / "config.toml") and Run(path).check(config, dataset, base)
    return False


def _earlier_output(config: PruneConfig) -> Path:
    """The default when names had no ``--model-arg`` and no numbers."""
    data = Path(config.data).absolute().name if config.data else "fashion-mnist"
    return Path("runs") / f"{config.model.replace(':', '-')}-{data}"


def likely(config: PruneConfig) -> Path:
    """The folder by options alone, before the data are known: where a STOP file is looked for."""
    try:
        return choose(config, None, None)[0]
    except GammaslimError:  # will be said in time
        return Path(config.output) if config.output else default_output(config)


def await_config(run: Path) -> None:
    """Wait until the job that has just taken ``run`` has written what run it is."""
    began = time.monotonic()
    while not is_file(run / "config.toml") and Lock(run).alive():
        if time.monotonic() - began > BEGINNING:
            return
        time.sleep(0.1)


def _numbers(first: Path) -> Iterator[Path]:
    yield first
    number = 2
    while True:
        yield first.with_name(f"{first.name}-{number}")
        number += 1


def _numbered(first: Path) -> list[Path]:
    """The folders of that name that there are, by their number."""
    name = re.compile(re.escape(first.name) + r"(?:-([2-9]|[1-9][0-9]{1,5}))?")
    try:
        found = {name.fullmatch(path.name): path for path in first.parent.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = sorted((int(match[1] or 1), path) for match, path in found.items() if match)
    return [path for _, path in matches]


def _reason(others: list[OtherRunError]) -> str:
    return others[0].difference if others else ""


def default_output(config: PruneConfig) -> Path:
    """``runs/MODEL-DATA``: the same name for the same command, so that it resumes itself."""
    return Path("runs") / default_name(config)


def default_name(config: PruneConfig) -> str:
    """MODEL with its arguments, and DATA: ``timm-resnet18-photos`` for timm:create_model."""
    module, _, factory = config.model.partition(":")
    texts = [value for _, value in config.model_arg if isinstance(value, str)]
    rest = [f"{k}={json.dumps(v)}" for k, v in config.model_arg if not isinstance(v, str)]
    parts = [module, "" if texts and factory in GENERIC else factory, *texts, *rest]
    data = os.path.basename(os.path.abspath(config.data)) if config.data else "fashion-mnist"  # noqa: PTH100, PTH119
    name = re.sub(r"[^\w.=+-]+", "-", "-".join(part for part in parts if part))
    return f"{name[:120]}-{data}" if data else name[:120]
