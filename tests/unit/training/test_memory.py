"""Memory does not grow over the rounds of a run."""

from __future__ import annotations

import gc
from pathlib import Path

from torch import nn

from job.training.session import RoundSpec
from support.training import trainer


def held() -> int:
    """Bytes of this process, pages that it shares counted in part."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def test_rounds_leave_nothing_behind(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    features = 20_000  # 1 MB of parameters, 4 MB with gradients and the states of AdamW
    grown = []
    for number in range(12):
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
        network = nn.Sequential(pool, nn.Linear(8, features), nn.Linear(features, 4))
        training.fit(network, RoundSpec(number, 1))
        del network
        grown.append(held())
    assert grown[-1] - grown[3] < 15 << 20, [size >> 20 for size in grown]
