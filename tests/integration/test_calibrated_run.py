"""The main job with everything that looks at calibration images, on one process and on two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import job
from support.commands import gammaslim, run
from support.datasets import write_noise_idx

LAUNCH = (sys.executable, "-m", "job", "launch", "--nproc", "2", "--")


def test_refit_regress_and_recalibration_are_the_same_on_two_processes(tmp_path: Path) -> None:
    data = write_noise_idx(tmp_path / "idx", 96, 40)
    args = (
        "prune", "--data", data, "--base-epochs", 0, "--rounds", 2, "--epochs", 1, "--wandb", "off",
        "--policy", "global", "--target", "macs=0.4", "--importance", "refit", "--round-to", 4,
        "--compensate", "regress", "--recalibrate", 3, "--batch-size", 16,
    )  # fmt: skip
    alone = gammaslim(*args, "--output", tmp_path / "one")
    assert alone.code == 0, alone
    both = run(*LAUNCH, *args, "--output", tmp_path / "two")
    assert both.code == 0, both
    cards, pruned = [], []
    for name in ("one", "two"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        whole, *rounds = (entry["macs"] for entry in [summary["base"], *summary["rounds"]])
        assert rounds[0] <= 0.4**0.5 * whole
        assert rounds[1] <= 0.4 * whole
        assert all("valid_acc_pruned" in entry for entry in summary["rounds"])
        folder = tmp_path / name / "rounds" / "01"
        cards.append(json.loads((folder / "model.json").read_text()))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        pruned.append(next(d["valid_loss_pruned"] for d in lines if d["event"] == "slim"))
        assert job.load(tmp_path / name)(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    assert cards[0]["layers"] == cards[1]["layers"]
    one, two = (
        json.loads((tmp_path / name / "rounds" / "01" / "sensitivity.json").read_text())
        for name in ("one", "two")
    )
    assert (one["loss"], one["images"]) == (two["loss"], two["images"])
    for mine, theirs in zip(one["groups"], two["groups"], strict=True):
        losses = ([point["loss"] for point in group["points"]] for group in (mine, theirs))
        assert next(losses) == pytest.approx(next(losses), rel=1e-3, abs=1e-9)
        assert mine["kept"] == theirs["kept"]
    # recalibration goes by each process's own batches, so not to the last digit
    assert pruned[0] == pytest.approx(pruned[1], rel=0.02)


def test_refit_without_regress_is_cautioned(tmp_path: Path) -> None:
    args = ("prune", "--dry-run", "--importance", "refit", "--compensate")
    assert "Warning: --importance refit assumes" in gammaslim(*args, "mean", cwd=tmp_path).err
    assert "refit assumes" not in gammaslim(*args, "regress", cwd=tmp_path).err
