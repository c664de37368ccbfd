"""What a cut frees goes back to the system; training keeps what it frees."""

from __future__ import annotations

import sys
from pathlib import Path

from support.commands import ROOT, run

MEASURE = """
import torch
from job.distributed.memory import keep_freed_memory, return_freed_memory
def held():
    with open("/proc/self/smaps_rollup") as file:
        (line,) = (line for line in file if line.startswith("Pss:"))
    return int(line.split()[1]) >> 10
def use(pinned):
    blocks = [torch.ones(size, 1 << 18) for size in (8, 24, 40)]  # MiB
    pinned.append(torch.ones(1 << 18))
    del blocks
keep_freed_memory()
pinned, begin = [], held()
use(pinned)
kept = held() - begin
with return_freed_memory():
    entered = held() - begin
    use(pinned)
returned = held() - begin
use(pinned)
print(kept, entered, returned, held() - begin)
"""


def test_memory_of_a_cut_is_returned(tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = run(sys.executable, script, env={"PYTHONPATH": str(ROOT)}, fork=False)
    assert done.code == 0, done
    kept, entered, returned, again = map(int, done.out.split())
    assert kept > 60  # MiB
    assert entered < 20  # what training has kept
    assert returned < 20
    assert again > 60
