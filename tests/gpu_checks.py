"""The job on one CUDA device, through the program: run by gpu.sh, never collected elsewhere."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from job.training.sync_batchnorm import synchronised
from support.commands import ROOT, Result, clean_environ
from support.networks import Norms

DEVICE = os.environ["GPU_CHECKS_DEVICE"]
PRECISIONS = ("fp32", "bf16")
ROWS: list[tuple[object, ...]] = [("run", "seconds", "images/s", "base", "slim")]


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(f"\n{name}, torch {torch.__version__}")
    for row in ROWS:
        print("  ".join(f"{value:>10}" for value in row))


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "job", *map(str, args)]


def environ() -> dict[str, str]:
    return {**clean_environ(), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}


def gammaslim(*args: object) -> Result:
    done = subprocess.run(
        command(*args), env=environ(), capture_output=True, text=True, timeout=900, check=False
    )
    return Result(done)


def options(output: Path, precision: str) -> tuple[object, ...]:
    return (
        "prune", "--output", output, "--device", DEVICE, "--precision", precision,
        "--base-epochs", 4, "--rounds", 2, "--epochs", 2, "--wandb", "off",
    )  # fmt: skip


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with the defaults, of fewer epochs and rounds, at each precision."""
    found = {}
    for precision in PRECISIONS:
        run = tmp_path_factory.mktemp("gpu") / precision
        began = time.perf_counter()
        done = gammaslim(*options(run, precision))
        took = time.perf_counter() - began
        assert done.code == 0, done
        assert f"1 process, {DEVICE}, {precision}" in done.out, done
        entries = summary(run)
        speeds = sorted(entry["images_per_second"] for entry in events(run, "epoch"))
        base, slim = entries["base"]["valid_acc"], entries["rounds"][-1]["valid_acc"]
        speed = f"{speeds[len(speeds) // 2]:,.0f}"
        ROWS.append((precision, f"{took:.1f}", speed, f"{base:.4f}", f"{slim:.4f}"))
        found[precision] = run
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_with_defaults_learns_and_slims(runs: dict[str, Path], precision: str) -> None:
    entries = summary(runs[precision])
    assert entries["state"] == "finished"
    assert entries["base"]["valid_acc"] > 0.7
    assert entries["rounds"][-1]["valid_acc"] > 0.7
    assert entries["rounds"][-1]["params"] < entries["base"]["params"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_processor_and_the_gpu_agree(runs: dict[str, Path], precision: str) -> None:
    results = []
    for device in ("cpu", DEVICE):
        done = gammaslim(
            "evaluate", runs[precision], "--json", "--split", "validation", "--device", device,
            "--precision", "fp32",
        )  # fmt: skip
        assert done.code == 0, done
        results.append(json.loads(done.out))
    one, other = results
    assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    moved = sum(
        abs(a - b)
        for left, right in zip(one["confusion"], other["confusion"], strict=True)
        for a, b in zip(left, right, strict=True)
    )
    assert moved <= 0.02 * one["count"]


def test_a_stopped_run_resumes(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        command(*options(run, "fp32")), env=environ(), stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not (
            (run / "metrics.jsonl").exists() and events(run, "epoch")
        ):
            time.sleep(0.1)
        (run / "STOP").touch()
        assert process.wait(300) == 75
    done = gammaslim(*options(run, "fp32"))
    assert done.code == 0, done
    assert len(events(run, "resume")) == 1
    assert len(events(run, "epoch")) == 8
    whole, resumed = summary(runs["fp32"]), summary(run)
    difference = whole["rounds"][-1]["valid_acc"] - resumed["rounds"][-1]["valid_acc"]
    assert abs(difference) < 0.05


def test_one_process_trains_with_torchs_own_batchnorm() -> None:
    """A step on the device, in either layout, is one in float64."""
    torch.manual_seed(0)
    exact = Norms().double().train()
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    for layout in (torch.contiguous_format, torch.channels_last):
        whole = copy.deepcopy(exact)
        ours = copy.deepcopy(exact).float().to(DEVICE)
        ours.to(memory_format=layout)
        kinds = [type(module) for module in ours.modules()]
        synchronised(ours, torch.device(DEVICE))
        assert [type(module) for module in ours.modules()] == kinds
        F.cross_entropy(whole(images.double()), labels).backward()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            inputs = images.to(DEVICE).contiguous(memory_format=layout)
            F.cross_entropy(ours(inputs), labels.to(DEVICE)).backward()
        for (name, mine), theirs in zip(ours.named_parameters(), whole.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(
                mine.grad.cpu().double(), theirs.grad, atol=1e-4, rtol=1e-3, msg=name
            )
        for mine, theirs in zip(ours.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(mine.cpu().double(), theirs.double(), atol=1e-5, rtol=1e-4)
