"""Memory does not grow over the rounds of a run."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
from torch import nn

from job.training.session import RoundSpec
from support.training import trainer

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()


class MallocInfo(ctypes.Structure):
    """glibc's statistics of its allocator, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def allocated() -> int:
    """Bytes that this process has allocated and not freed."""
    gc.collect()
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("not glibc 2.33 or newer")
    library.mallinfo2.restype = MallocInfo
    info = library.mallinfo2()
    return int(info.uordblks) + int(info.hblkhd)


def test_rounds_leave_nothing_behind(tmp_path: Path) -> None:
    training, sizes = trainer(tmp_path), []
    width = 4096  # 200 KB of parameters, 800 KB with gradients and the states of AdamW
    for number in range(7):
        first = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
        network = nn.Sequential(first, nn.Linear(8, width), nn.Linear(width, 4))
        training.fit(network, RoundSpec(number, 1))
        del network
        sizes.append(allocated())
    assert sizes[-1] - sizes[2] < 400_000, sizes
