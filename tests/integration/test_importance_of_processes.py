"""Several processes find the importance that one finds."""

from __future__ import annotations

import sys

from support.commands import ROOT, run

WORKER = ROOT / "tests" / "support" / "workers" / "calibration.py"


def test_processes_find_together_what_one_finds_alone() -> None:
    done = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 3, WORKER
    )
    assert done.code == 0, done
    assert done.out.count("all checks passed") == 3
