"""Run commands as a user does, in a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.programs import forkable, run_forked

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"  # where support.smooth can be imported


# where several processes are compared, whose rounding least squares would magnify
HOMEWORK_CUT = ("--importance", "gamma", "--compensate", "none")
NARROW = ("--model-arg", "base=4")  # a StudentNet of a quarter of the channels
LAUNCH = (sys.executable, "-m", "job", "launch", "--nproc", "2", "--")


class Result:
    """How a command ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def long_run(data: Path, output: Path) -> tuple[object, ...]:
    """Options of a run that trains until it is stopped."""
    return (
        "prune", "--data", data, "--output", output, *NARROW, "--base-epochs", 400, "--rounds", 1,
        "--epochs", 1, "--batch-size", 16, "--wandb", "off", "--checkpoint-every", 0,
    )  # fmt: skip


def clean_environ() -> dict[str, str]:
    """The caller's environment without W&B's and Gammaslim's variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "GAMMASLIM_"))}


def run(
    *command: object,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    fork: bool = True,
) -> Result:
    """Run a command without W&B's and Gammaslim's variables of the caller.

    Programs that import torch are run by ``fork`` where that makes no difference (programs.py).
    """
    parts, whole = [str(part) for part in command], {**clean_environ(), **(env or {})}
    if fork and forkable(parts, env or {}):
        return Result(run_forked(parts[1:], whole, cwd))
    done = subprocess.run(
        parts, env=whole, cwd=cwd, capture_output=True, text=True, timeout=900, check=False
    )
    return Result(done)


def gammaslim(
    *args: object,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    fork: bool = True,
) -> Result:
    """Run ``python -m job …``."""
    return run(sys.executable, "-m", "job", *args, env=env, cwd=cwd, fork=fork)
