"""The conditions of a measurement, and its table as text and JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from job.console import table
from job.distributed.cores import available_cores

PACKAGES = ("torch", "torchvision", "pillow", "numpy", "accelerate")
IDLE = 0.3  # load of other programs per core, above which a measurement is not worth publishing


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Versions, machine, date, and the load of the machine before the measurement."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": available_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "device": _device_name(device),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def publish(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any],
    output: Path | None,
) -> None:
    """Print the rows as a table with their conditions; write both into ``output`` as JSON."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{title}")
    print(table(header, [[_text(row.get(key)) for key in header] for row in rows]))
    print("  ".join(f"{key} {value}" for key, value in found.items()))
    if found.get("load", 0) > IDLE * found.get("cores", 1):
        print("the machine was busy: do not publish these numbers", file=sys.stderr)
    if output:
        content = {"title": title, "conditions": dict(found), "rows": [dict(row) for row in rows]}
        output.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        print(f"written to {output}")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
