"""Run by test_matrix: one network through the whole job and what comes after it.

python tests/support/workers/matrix.py FOLDER SIZE PRUNE_OPTION...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import job
from job.cli.main import gammaslim


def command(*args: object) -> None:
    """A command of the program in this process; what it raises ends it with its exit code."""
    gammaslim([str(arg) for arg in args], prog_name="gammaslim", standalone_mode=True)


def run(*args: object) -> None:
    """A command that must end with 0."""
    try:
        command(*args)
    except SystemExit as end:
        if end.code:
            raise


def main(folder: Path, size: int, options: list[str]) -> None:
    """Train, cut, fine-tune and save; load, evaluate and export the round's network."""
    run("prune", *options)
    network = job.load(folder / "run" / "rounds" / "01")
    assert not network.training
    with torch.inference_mode():
        logits = network(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 2)
    assert logits.isfinite().all()
    network.train()(torch.rand(4, 3, size, size))
    run("evaluate", folder / "run", "--data", folder / "data", "--device", "cpu", "--workers", 0)
    onnx = folder / "network.onnx"
    run("export", folder / "run" / "rounds" / "01", "--format", "onnx", "--output", onnx)
    assert onnx.stat().st_size > 1000
    print("all steps done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
