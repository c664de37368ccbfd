"""Run ``gammaslim`` and kill it with SIGKILL at the N-th passage of a place in the code.

    python kill_at.py PLACE N PROOF prune …

PROOF is a file that gets the place's name right before the kill. KILL_RANK in the environment kills
one of several processes only. KILL_SIGNAL=SIGTERM asks it to stop there instead.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import job.artifacts.checkpoint
import job.artifacts.run_directory
import job.artifacts.tensor_file
import job.data.image_check
import job.files
import job.pipeline.prune
import job.pipeline.session
import job.slimming.cut
import job.slimming.proven_plan
import job.slimming.recovery.recovery
import job.slimming.sensitivity.replay
import job.training.evaluation
import job.training.trainer
from job.__main__ import main

passed = 0


def die() -> None:
    descriptor = os.open(proof, os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, place.encode())
    os.fsync(descriptor)
    os.kill(os.getpid(), getattr(signal, os.environ.get("KILL_SIGNAL", "SIGKILL")))


def due() -> bool:
    global passed
    if os.environ.get("KILL_RANK") not in (None, "", os.environ.get("RANK", "0")):
        return False
    passed += 1
    return passed == count


def before(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def killing(*args: Any, **kwargs: Any) -> Any:
        if due():
            die()
        return original(*args, **kwargs)

    setattr(owner, name, killing)


def after(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def killing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if due():
            die()
        return result

    setattr(owner, name, killing)


def half_a_file() -> None:
    original = job.artifacts.tensor_file.save_file

    def killing(tensors: Any, path: Path, *rest: Any) -> None:
        original(tensors, path, *rest)
        if due():
            os.truncate(path, path.stat().st_size // 2)
            die()

    job.artifacts.tensor_file.save_file = killing


def in_evaluation() -> None:
    original = job.training.evaluation.Evaluator._outputs

    def killing(self: Any, *args: Any) -> Any:
        for outputs in original(self, *args):
            if due():
                die()
            yield outputs

    job.training.evaluation.Evaluator._outputs = killing  # type: ignore[method-assign]


def half_deleted() -> None:
    original = shutil.rmtree

    def killing(path: Path, **kwargs: Any) -> None:
        if Path(path).parent.name == "checkpoints" and Path(path).exists() and due():
            next(Path(path).iterdir()).unlink()
            die()
        original(path, **kwargs)

    shutil.rmtree = killing  # type: ignore[assignment]


def slow_check() -> None:
    """Reading an image takes long: there are as many as one wants."""
    original = job.data.image_check.check_image

    def checking(path: Path) -> tuple[int, int]:
        time.sleep(1)
        if due():
            die()
        return original(path)

    job.data.image_check.check_image = checking


PLACES = {
    "data check": slow_check,
    "W&B begins": lambda: before(job.pipeline.session, "Tracker"),
    "step": lambda: after(job.training.trainer.TrainingRound, "step"),
    "evaluation": in_evaluation,
    "output loss": lambda: after(job.slimming.sensitivity.replay.Replay, "run_from"),
    "surgery": lambda: before(job.slimming.cut, "apply_plan"),
    "proof of a cut": lambda: after(job.slimming.proven_plan, "verify"),
    "recovery step": lambda: after(job.slimming.recovery.recovery.Recovery, "step"),
    "file write": half_a_file,
    "fsync": lambda: before(job.files, "sync_path"),
    "rename": lambda: before(Path, "rename"),
    "after a rename": lambda: after(Path, "rename"),
    "replace": lambda: before(Path, "replace"),
    "metrics line": lambda: after(job.artifacts.run_directory.Run, "log"),
    "round to be saved": lambda: before(job.artifacts.run_directory.Run, "save_round"),
    "round saved": lambda: after(job.artifacts.run_directory.Run, "save_round"),
    "summary": lambda: before(job.artifacts.run_directory.Run, "summarise"),
    "old checkpoint": half_deleted,
}

if __name__ == "__main__":  # loader processes import this too
    place, count, proof = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    sys.argv = ["gammaslim", *sys.argv[4:]]
    PLACES[place]()
    main()
