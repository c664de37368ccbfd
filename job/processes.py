"""Rank, world size and main process of a job, without importing torch."""

from __future__ import annotations

import os
import sys
from typing import Any


def rank() -> int:
    """Return this process's rank; 0 before the processes have joined."""
    joined = _joined()
    return int(joined.get_rank()) if joined else 0


def world_size() -> int:
    """Return the number of processes; 1 before they have joined."""
    joined = _joined()
    return int(joined.get_world_size()) if joined else 1


def local_world_size() -> int:
    """Return the number of processes that the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process decides, writes, and prints.

    It is rank 0. Before the processes have joined, the launcher's variables say which one that
    will be.
    """
    if _joined():
        return rank() == 0
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


def _joined() -> Any:
    """Return torch.distributed once the processes have joined, else None."""
    distributed = sys.modules.get("torch.distributed")
    # not there where torch is built without it, and while another thread imports it
    is_initialized = getattr(distributed, "is_initialized", None)
    return distributed if is_initialized and is_initialized() else None
