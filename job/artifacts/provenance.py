"""Provenance of a model: the data of its run, from config.toml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.run_config import read_run_config
from job.data.folders import CURRENT_LISTING
from job.data.layout import BUILT_IN
from job.data.shard_layout import is_shard_pattern
from job.errors import InputNotFound, UsageError, shown

if TYPE_CHECKING:
    from job.artifacts.records import Lineage
    from job.files import JsonObject


def _dataset_table(run: Path) -> JsonObject | None:
    """Return the table [dataset] of a run; None where there is no such table."""
    try:
        return read_run_config(run).get("dataset") or None
    except (OSError, ValueError):
        return None  # no file, or a damaged one: reported when the run is resumed


def stored_listing(run: Path) -> int:
    """Return the version of the listing rules that ``run`` uses; the current one for a new run."""
    table = _dataset_table(run)
    return CURRENT_LISTING if table is None else valid_listing(table.get("listing", 1))


def valid_listing(value: object) -> int:
    """Return ``value`` if it is a version of the listing rules, else the current version."""
    known = type(value) is int and 1 <= value <= CURRENT_LISTING
    return value if known and isinstance(value, int) else CURRENT_LISTING


def find_dataset_table(model: str, lineage: Lineage) -> JsonObject | None:
    """Return the table [dataset] of the run that a model comes from; None if it is not known."""
    folder = Path(model)
    places = [folder, folder.absolute().parent.parent]
    places += [Path(lineage.run)] if lineage.run else []
    return next((table for place in places if (table := _dataset_table(place))), None)


def find_run_data(model: str, lineage: Lineage) -> str:
    """Return ``--data`` of the run that a model comes from, by its folder or its ``lineage``.

    Raises UsageError if the run is unknown, InputNotFound if the data no longer exist.
    """
    record = find_dataset_table(model, lineage)
    if record is None:
        raise UsageError(
            f"{shown(model)} does not say which data it was trained on: pass --data D "
            f"(--data {BUILT_IN} is the sample of Fashion-MNIST)"
        )
    if record.get("layout") == BUILT_IN:
        return BUILT_IN
    names = [
        name for key in ("path", "root") if (name := record.get(key)) and isinstance(name, str)
    ]
    found = (name for name in names if Path(name).exists() or is_shard_pattern(name))
    existing = next(found, None)
    if existing is None:
        named = f", {names[0]}," if names else ""
        raise InputNotFound(f"the data of {shown(model)}{named} are not here: pass --data D")
    return existing


def find_task_data(model: str, lineage: Lineage) -> str | None:
    """Return ``--data`` of the run of a task that a model comes from; None if it had none."""
    path = (find_dataset_table(model, lineage) or {}).get("path")
    return path if isinstance(path, str) else None
