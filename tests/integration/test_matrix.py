"""Every kind of network through the whole job, by one process and by two.

Base training, a round with the default cut, fine-tuning, save, load, evaluate, ONNX. A sample
runs by default; all of them: ``python -m pytest -n 14 --all tests/integration/test_matrix.py``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torchvision

from support.commands import ROOT, Result, clean_environ
from support.datasets import write_flat

WORKER = ROOT / "tests" / "support" / "workers" / "matrix.py"
TORCHVISION = torchvision.models.list_models(module=torchvision.models)
OWN = ["student", "vgg19-cifar", "resnet164-cifar", "densenet40-cifar"]
TIMM = [
    "resnet10t", "mobilenetv3_small_050", "efficientnet_b0", "regnetx_002", "convnext_atto",
    "rexnet_100", "ghostnet_050", "hrnet_w18_small", "levit_128s", "mixer_s32_224",
    "vit_tiny_patch16_224", "repvgg_a0",
]  # fmt: skip
SIZES = {
    "alexnet": 64, "googlenet": 32, "inception_v3": 75, "maxvit_t": 224, "vit_h_14": 28,
    "timm-levit_128s": 224,
}  # fmt: skip
SIZED = {"timm-mixer_s32_224": "img_size", "timm-vit_tiny_patch16_224": "img_size"}


# 32 pixels leave one pixel to their last BatchNorms, and a few steps without warm-up diverge: they
# do in plain torch too, where evaluation is then NaN
DELICATE = ("mnasnet", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_")


@dataclass(frozen=True)
class Case:
    """A network, and how many processes train it."""

    name: str
    processes: int

    @property
    def size(self) -> int:
        """Pixels: the fewest that the network takes, of those that we give."""
        return SIZES.get(self.name, 64 if self.name.startswith(DELICATE) else 32)

    @property
    def lr(self) -> str:
        """Learning rate."""
        return "1e-5" if self.name.startswith(DELICATE) else "1e-3"

    def options(self) -> list[object]:
        """``--model`` and its arguments."""
        sized = "image_size" if self.name.startswith("vit_") else SIZED.get(self.name)
        args = ["--model-arg", f"{sized}={self.size}"] if sized else []
        if self.name.startswith("timm-"):
            name = self.name.removeprefix("timm-")
            return ["--model", f"timm:{name}", *args]
        return ["--model", self.name, *args]


SAMPLE = [Case("resnet18", 1), Case("timm-regnetx_002", 2)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [*OWN, *TORCHVISION, *(f"timm-{name}" for name in TIMM)]
    cases = [Case(name, processes) for name in names for processes in (1, 2)]
    if not metafunc.config.getoption("--all"):
        cases = SAMPLE
    metafunc.parametrize("case", cases, ids=[f"{case.name}-{case.processes}" for case in cases])


def test_the_whole_job(case: Case, tmp_path: Path) -> None:
    write_flat(tmp_path / "data", {"training": 6, "validation": 2}, classes=2, size=case.size)
    prune = [
        *case.options(), "--data", tmp_path / "data", "--output", tmp_path / "run", "--transform",
        "small", "--image-size", case.size, "--batch-size", 4, "--base-epochs", 1, "--rounds", 1,
        "--epochs", 1, "--workers", 0, "--device", "cpu", "--optimizer", "sgd", "--lr", case.lr,
        "--wandb", "off",
    ]  # fmt: skip
    try:
        if case.processes > 1:
            done = start("-m", "job", "launch", "--nproc", case.processes, "--", "prune", *prune)
        else:
            done = start(WORKER, tmp_path, case.size, *prune)
            assert "all steps done" in done.out, done
        assert done.code == 0, done
        assert "Warning: BatchNorm" not in done.out + done.err, done
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        base, slim = summary["base"], summary["rounds"][0]
        assert summary["state"] == "finished"
        assert slim["params"] < base["params"]
    finally:
        shutil.rmtree(tmp_path)  # some networks have gigabytes of weights


def start(*command: object) -> Result:
    """Run Python on one thread, for as long as a large network takes."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**clean_environ(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    return Result(done)
