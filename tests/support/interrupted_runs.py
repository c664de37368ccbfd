"""Small runs that are killed or stopped, and what must be the same when they have resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support.commands import NARROW, ROOT

WORKERS = ROOT / "tests" / "support" / "workers"
KILL_AT, RECORD = WORKERS / "kill_at.py", WORKERS / "record_batches.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


SPEEDUP = {"speedup", "speedup_low", "speedup_high"}  # measured times


def small_run(data: Path, output: Path, *more: object) -> tuple[object, ...]:
    """Arguments of a run of 18 steps on 48 images: a base and two rounds of 2 epochs each.

    Its network is narrow, and no loader process takes three seconds to start.
    """
    network = () if "--model" in more else NARROW
    return (
        "prune", "--data", data, "--output", output, *network, "--base-epochs", 2, "--rounds", 2,
        "--epochs", 2, "--batch-size", 16, "--wandb", "off", "--checkpoint-every", 0,
        "--workers", 0, *more,
    )  # fmt: skip


def metrics(output: Path) -> list[dict[str, object]]:
    """The run's lines but for times and for what tells of interruptions."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clocks = {"seconds", "images_per_second", "latency"} | SPEEDUP
    return [
        {key: value for key, value in line.items() if key not in clocks}
        for line in lines
        if line["event"] not in ("resume", "stop")
    ]


def assert_same_run(output: Path, undisturbed: Path) -> None:
    """The same weights and records in every round, the same metrics, and no temporary files."""
    rounds = sorted(path.name for path in (undisturbed / "rounds").iterdir())
    assert sorted(path.name for path in (output / "rounds").iterdir()) == rounds
    for round_name in rounds:
        name = Path("rounds") / round_name / "model.safetensors"
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes(), round_name
        for file in ("sensitivity.json", "evaluation.json"):
            measured = undisturbed / "rounds" / round_name / file
            again = output / "rounds" / round_name / file
            assert again.exists() == measured.exists(), (round_name, file)
            if measured.exists():
                assert again.read_bytes() == measured.read_bytes(), (round_name, file)
    assert metrics(output) == metrics(undisturbed)
    assert not list(output.rglob("*.tmp"))
