"""``config.toml`` of a run: options, data set, base and versions, written at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from job.artifacts.json_records import to_json
from job.artifacts.versions import package_versions
from job.config import PruneConfig
from job.files import parse_toml, read_bytes, toml_text, write_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from job.artifacts.records import BaseRecord, DatasetRecord

CONFIG_FILE = "config.toml"


def write_run_config(
    run: Path, config: PruneConfig, dataset: DatasetRecord, base: BaseRecord
) -> None:
    """Write the tables ``prune``, ``dataset``, ``base`` and ``versions``; raises StorageError."""
    _write_tables(run, {
        "prune": config.to_dict(), "dataset": to_json(dataset), "base": to_json(base),
        "versions": package_versions(),
    })  # fmt: skip


def read_run_config(run: Path) -> dict[str, Any]:
    """Read the tables; raises OSError or ValueError."""
    return parse_toml(read_bytes(run / CONFIG_FILE).decode())


def stored_rounds(run: Path) -> Any:
    """Return the present ``--rounds`` of the run; None if the file cannot be read."""
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


def _stored(run: Path, table: str, key: str, default: Any) -> Any:
    """Return a value; None where the file cannot be read or has no such table."""
    try:
        return read_run_config(run)[table].get(key, default)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_tables(run: Path, tables: dict[str, Any]) -> None:
    write_bytes(run / CONFIG_FILE, toml_text(tables).encode())
