"""``config.toml`` of a run: options, data set, base and versions, written at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.artifacts.json_records import to_json
from job.artifacts.versions import package_versions
from job.config import PruneConfig
from job.files import JsonObject, parse_toml, read_bytes, toml_text, write_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from job.artifacts.records import BaseRecord, DatasetRecord

CONFIG_FILE = "config.toml"
Tables = dict[str, JsonObject]  # by name; the values are not checked yet


def write_run_config(
    run: Path, config: PruneConfig, dataset: DatasetRecord, base: BaseRecord
) -> None:
    """Write the tables ``prune``, ``dataset``, ``base`` and ``versions``; raises StorageError."""
    _write_tables(run, {
        "prune": config.to_dict(), "dataset": to_json(dataset), "base": to_json(base),
        "versions": package_versions(),
    })  # fmt: skip


def read_run_config(run: Path) -> Tables:
    """Read the tables; raises OSError, or ValueError if the file holds anything else."""
    tables: Tables = {}
    for name, table in parse_toml(read_bytes(run / CONFIG_FILE).decode()).items():
        if not isinstance(table, dict):
            raise ValueError(f"{name} is not a table")
        tables[name] = table
    return tables


def stored_rounds(run: Path) -> object:
    """Return the current ``--rounds`` of the run; None if the file cannot be read."""
    return _stored(run, "prune", "rounds", PruneConfig.rounds)


def stored_base_epochs(run: Path) -> int | None:
    """Return the epochs of base training, even if an earlier version set them by default."""
    epochs = _stored(run, "base", "epochs", None)
    return epochs if type(epochs) is int and epochs >= 0 else None


def change_rounds(run: Path, rounds: object) -> None:
    """Replace ``--rounds``; raises StorageError, OSError or ValueError."""
    tables = read_run_config(run)
    tables["prune"]["rounds"] = rounds
    _write_tables(run, tables)


def _stored(run: Path, table: str, key: str, default: object) -> object:
    """Return a value; None where the file cannot be read or has no such table."""
    try:
        return read_run_config(run)[table].get(key, default)
    except (OSError, ValueError, KeyError):
        return None


def _write_tables(run: Path, tables: Mapping[str, Mapping[str, object]]) -> None:
    write_bytes(run / CONFIG_FILE, toml_text(tables).encode())
