"""Whole branches are removed by the default cut, in a call, a command and a run."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import job
from job.artifacts.model_card import load_model
from job.slimming.graph.removed_layers import ConstantOutput
from support.commands import gammaslim, run
from support.datasets import write_noise_idx
from support.interrupted_runs import KILL_AT, assert_same_run, small_run

# the last layer of the second block adds next to nothing
FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width, scale):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.constant_(self.bn2.weight, scale)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)

def residual(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        Block(12, 1.0), Block(12, 1e-4), Block(12, 1.0),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes),
    )
"""
MODEL = ("--model", "nets:residual")
GLOBAL = ("--policy", "global", "--target", "macs=0.6")


def residual() -> nn.Module:
    names: dict[str, object] = {}
    exec(FACTORY, names)
    torch.manual_seed(0)
    return names["residual"]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factory, weights of its network, and images."""
    path = tmp_path_factory.mktemp("depth")
    (path / "nets.py").write_text(FACTORY)
    torch.save(residual().state_dict(), path / "w.pt")
    write_noise_idx(path / "idx", 48, 20)
    return path


def test_a_call_removes_the_branch_that_adds_nothing() -> None:
    network, images = residual().eval(), torch.rand(64, 3, 16, 16)
    for depth, gone in (("auto", ["4.conv1", "4.conv2", "4.bn1", "4.bn2"]), ("off", [])):
        narrow, plan = job.slim(
            network, images[:1], target="macs=0.75", calibration=[images], depth=depth
        )
        assert [n for n, kept in plan.groups.items() if not kept] == gone[:1]
        assert isinstance(narrow[4].conv2, ConstantOutput) == (depth == "auto")
        assert ("removed whole: 4." in str(plan)) == (depth == "auto")
        assert plan.proof.error < plan.proof.tolerance
    with pytest.raises(job.GammaslimError, match="depth"):
        job.slim(network, images[:1], depth="deep")


def test_the_command_names_what_it_removed(folder: Path) -> None:
    common = ("slim", "w.pt", *MODEL, "--num-classes", 10, "--data", "idx", "--image-size", 32,
              "--target", "macs=0.75", "--workers", 0)  # fmt: skip
    done = gammaslim(*common, "--output", "cut", cwd=folder)
    assert done.code == 0, done
    assert "removed whole: 4.conv1, 4.bn1, 4.conv2" in done.out
    shown = gammaslim("inspect", "cut", "--json", cwd=folder)
    assert set(json.loads(shown.out)["removed"]) >= {"4.conv1", "4.conv2"}
    assert "removed whole" in gammaslim("inspect", "cut", cwd=folder).out
    assert gammaslim("evaluate", "cut", "--data", "idx", "--workers", 0, cwd=folder).code == 0
    exported = gammaslim("export", "cut", "--output", "cut.onnx", cwd=folder)
    assert exported.code == 0, exported
    done = gammaslim(*common, "--output", "deep", "--depth", "off", cwd=folder)
    assert "removed whole" not in done.out


def rounds(folder: Path, output: Path) -> tuple[object, ...]:
    """A run whose first round removes a branch, and whose second cuts what is left."""
    weights = ("--weights", folder / "w.pt", "--base-epochs", 0, "--recover", 1)
    return small_run(folder / "idx", output, *MODEL, *GLOBAL, *weights)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    output = folder / "whole"
    done = gammaslim(*rounds(folder, output), cwd=folder)
    assert done.code == 0, done
    assert "removed whole: 4." in done.out
    return output


def test_a_run_carries_what_it_removed(whole: Path, folder: Path) -> None:
    sys.path.insert(0, str(folder))
    try:
        network, card = load_model(whole / "rounds" / "02")
    finally:
        sys.path.remove(str(folder))
    assert isinstance(network[4].conv2, ConstantOutput)
    assert card.layers["4.conv2"].is_constant


def test_a_killed_run_resumes_without_the_branch(whole: Path, folder: Path, tmp_path: Path) -> None:
    """In the second round: its wide network is built from the card of the first."""
    args = rounds(folder, tmp_path / "run")
    killed = run(sys.executable, KILL_AT, "step", 8, tmp_path / "proof", *args, cwd=folder)
    assert killed.code == -signal.SIGKILL, killed
    assert gammaslim(*args, cwd=folder).code == 0
    assert_same_run(tmp_path / "run", whole)


def test_two_processes_remove_the_same(whole: Path, folder: Path, tmp_path: Path) -> None:
    args = rounds(folder, tmp_path / "run")
    done = gammaslim("launch", "--nproc", 2, "--", *args, cwd=folder)
    assert done.code == 0, done
    plans = [
        json.loads((path / "rounds" / "01" / "model.json").read_text())["layers"]
        for path in (whole, tmp_path / "run")
    ]
    assert plans[0]["4.conv2"] == plans[1]["4.conv2"]
