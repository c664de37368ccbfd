"""``--target latency=…`` on a command line; a busy machine may not reach the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from job.models.student import StudentNet
from support.commands import gammaslim
from support.datasets import write_noise_idx
from support.interrupted_runs import small_run


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(StudentNet(16, num_classes=5).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_slim_cuts_to_a_latency(weights: Path, tmp_path: Path) -> None:
    done = gammaslim(
        "slim", weights, "--model", "student", "--image-size", 32, "--target", "latency=0.85",
        "--latency-batch", 8, "--output", tmp_path / "slim",
        env={"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    (cached,) = (tmp_path / "cache" / "gammaslim" / "latency").iterdir()
    assert all("Conv2d" in key or "Linear" in key or "BatchNorm2d" in key
               for key in json.loads(cached.read_text()))  # fmt: skip
    if done.code:
        assert (done.code, "cannot be reached here: the minimum is" in done.err) == (2, True), done
    else:
        assert "\nlatency: " in done.out
        assert " for the base (" in done.out


def test_a_run_cuts_to_a_latency(tmp_path: Path) -> None:
    data, output = write_noise_idx(tmp_path / "idx", 48, 20), tmp_path / "run"
    done = gammaslim(
        *small_run(data, output, "--target", "latency=0.95", "--rounds", 1, "--policy", "global"),
        env={"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    if done.code:
        assert (done.code, "cannot be reached here: the minimum is" in done.err) == (2, True), done
    else:
        assert "\nlatency: " in done.out
        assert json.loads((output / "summary.json").read_text())["state"] == "finished"
