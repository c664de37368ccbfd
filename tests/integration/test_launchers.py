"""The launchers give the same run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from support.commands import LAUNCH, long_run, run

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes")
JOB = ("-m", "job")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def test_accelerate_and_launch_give_the_same_run(noise: Path, tmp_path: Path) -> None:
    """Files, models, summary and metrics but their times; accelerate's exit code is 0 or 1."""
    started = {
        "alone": (sys.executable, *JOB),
        "accelerate 1": (*ACCELERATE, 1, *JOB),
        "launch 2": (*LAUNCH[:-1], "--"),
        "accelerate 2": (*ACCELERATE, 2, *JOB),
    }
    small = ("--base-epochs", 1, "--rounds", 1, "--epochs", 1)
    found = {}
    for name, launcher in started.items():
        output = tmp_path / name / "run"
        done = run(*launcher, *long_run(noise, output), *small, env=ONE_THREAD, fork=False)
        assert done.code == 0, done
        found[name] = result(output)
        lines = [line for line in done.out.splitlines() if not line.startswith("run:")]
        assert len([line for line in lines if line.startswith("rate ")]) == 2  # one voice
    assert found["accelerate 1"] == found["alone"]
    assert found["accelerate 2"] == found["launch 2"]
    assert found["alone"].keys() == found["launch 2"].keys()
    missing = run(*started["accelerate 1"], "prune", "--data", tmp_path / "no")
    assert missing.code == 1  # launch: 66, see above
    assert missing.err.count("Error: ") == 1 + missing.err.count("CalledProcessError: ")


def result(output: Path) -> dict[str, object]:
    """What a run has written, by file, without times, places and versions."""
    found: dict[str, object] = {}
    for file in output.rglob("*"):
        name = str(file.relative_to(output))
        found[name] = None
        if file.suffix == ".safetensors":
            found[name] = file.read_bytes()
        elif file.name in ("summary.json", "metrics.jsonl"):
            text = file.read_text()
            found[name] = re.sub(
                r'"(seconds|images_per_second|latency|speedup(_low|_high)?)": [\d.e+-]+',
                "",
                text,
            )
    return found
