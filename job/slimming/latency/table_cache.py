"""Cache of layer tables on disk, so that a layer is measured once on a device.

A JSON file for each device, number of threads, precision, memory format and version of torch has
the tables by the shape of the layer, including the batch size.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from job.errors import GammaslimError
from job.files import write_bytes
from job.slimming.latency.layer_table import LayerTable
from job.slimming.latency.machine import device_name

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER_VARIABLE = "XDG_CACHE_HOME"
TABLES_FORMAT = 1


def cache_file(device: torch.device, dtype: torch.dtype, layout: str) -> Path:
    """Return the path of the tables of a device, in $XDG_CACHE_HOME or ~/.cache."""
    conditions = (
        TABLES_FORMAT, device.type, device_name(device), torch.get_num_threads(), str(dtype),
        layout, torch.__version__, torch.version.cuda,
    )  # fmt: skip
    name = hashlib.sha256(repr(conditions).encode()).hexdigest()[:16]
    given = os.environ.get(FOLDER_VARIABLE)
    folder = Path(given) if given else Path.home() / ".cache"
    return folder / "gammaslim" / "latency" / f"{name}.json"


def read_tables(path: Path) -> dict[str, LayerTable]:
    """Return the tables of a file by shape; empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return {key: LayerTable.from_dict(values) for key, values in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_tables(path: Path, tables: Mapping[str, LayerTable]) -> bool:
    """Write ``tables``; return whether it succeeded. A failure is no error of the caller."""
    content = json.dumps({key: table.to_dict() for key, table in tables.items()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.encode())
    except (OSError, GammaslimError):
        return False
    return True
