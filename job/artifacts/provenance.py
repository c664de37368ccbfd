"""Which data a run was trained on, by its config.toml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.folders import CURRENT_LISTING
from job.data.layout import BUILT_IN
from job.errors import InputNotFound, UsageError, shown
from job.files import is_file, parse_toml, read_bytes

if TYPE_CHECKING:
    from job.artifacts.records import Lineage


def _record(run: Path) -> dict[str, Any] | None:
    """The table [dataset] of a run; None where there is no run that has one."""
    path = run / "config.toml"
    if not is_file(path):
        return None
    try:
        table = parse_toml(read_bytes(path).decode()).get("dataset")
    except (OSError, ValueError):
        return None  # said by whoever resumes the run
    return table if isinstance(table, dict) and table else None


def listing_of(run: Path) -> int:
    """The listing that ``run`` was begun with; the present one where there is no run yet."""
    record = _record(run)
    return CURRENT_LISTING if record is None else as_listing(record.get("listing", 1))


def as_listing(value: object) -> int:
    """A listing as a file has it; the present one where it is none."""
    return value if value in (1, CURRENT_LISTING) and isinstance(value, int) else CURRENT_LISTING


def own_data(model: str, lineage: Lineage) -> str:
    """What ``--data`` was of the run that a model comes from, by its folder or its ``lineage``.

    Raises UsageError where that is not known, InputNotFound where it is not there.
    """
    folder = Path(model)
    places = [folder, folder.absolute().parent.parent]
    places += [Path(lineage.run)] if lineage.run else []
    record = next((table for place in places if (table := _record(place))), None)
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
    found = next((name for name in names if Path(name).exists()), None)
    if found is None:
        named = f", {names[0]}," if names else ""
        raise InputNotFound(f"the data of {shown(model)}{named} are not here: pass --data D")
    return found
