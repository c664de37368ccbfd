"""What W&B costs a job: the same job without it, with its server answering, and in an outage.

    python tests/benchmarks/wandb_cost.py [--repeat 3] [--epochs 12]

runs the default job on the built-in data with a stand-in for W&B's server on 127.0.0.1, the kinds
alternating in one run, and prints the medians of the training speed (images a second of every epoch
but an attempt's first) and of the whole job's seconds, with their ratios to the job without W&B.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.wandb_server import WandbServer

KINDS = ("off", "offline", "answer", "500", "reset", "hang")


def job(kind: str, folder: Path, epochs: int) -> tuple[float, float]:
    """Images a second, and seconds of the whole command."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    online = kind not in ("off", "offline")
    command = [
        sys.executable, "-m", "job", "prune", "--output", str(folder), "--base-epochs", str(epochs),
        "--rounds", "1", "--epochs", str(epochs), "--wandb", "online" if online else kind,
    ]  # fmt: skip
    with WandbServer(kind if online else "answer") as server:
        began = time.perf_counter()
        subprocess.run(command, env=environ | server.env, check=True, capture_output=True)
        seconds = time.perf_counter() - began
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    speeds = [line["images_per_second"] for line in lines if line["event"] == "epoch"]
    return statistics.median(speeds[1:]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="of the base, and of one round")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    runs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in args.kinds}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.repeat):
            for kind in args.kinds:
                runs[kind].append(job(kind, Path(folder) / f"{kind}-{number}", args.epochs))
                print(kind, *runs[kind][-1], file=sys.stderr, flush=True)
    medians = {
        kind: [statistics.median(part) for part in zip(*found, strict=True)]
        for kind, found in runs.items()
    }
    whole = medians[args.kinds[0]]
    print(f"| W&B | images/s | to {args.kinds[0]} | job, s | to {args.kinds[0]} |")
    print("|---|---|---|---|---|")
    for kind, (speed, seconds) in medians.items():
        row = f"{speed:,.0f} | {speed / whole[0]:.3f} | {seconds:.1f} | {seconds / whole[1]:.3f}"
        print(f"| {kind} | {row} |")


if __name__ == "__main__":
    main()
