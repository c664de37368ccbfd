"""Run directories written by an earlier version: they are read, shown and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.commands import ROOT, gammaslim

OLD = ROOT / "tests" / "support" / "old_runs"
OPTIONS = (
    "--model-arg", "base=2", "--base-epochs", 1, "--epochs", 2, "--seed", 1, "--device", "cpu",
    "--workers", 0, "--wandb", "off", "--importance", "refit", "--compensate", "regress",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "runs")
    return tmp_path / "runs"


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_a_stopped_run_resumes_where_it_was(folder: Path) -> None:
    run = folder / "stopped"
    before = (run / "rounds" / "01" / "model.safetensors").read_bytes()
    done = gammaslim("prune", *OPTIONS, "--rounds", 2, "--output", run)
    assert done.code == 0, done
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines if line["event"] == "resume"] == [23]
    assert [(line["round"], line["epoch"]) for line in lines if line["event"] == "epoch"] == [
        (0, 0), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert (run / "rounds" / "01" / "model.safetensors").read_bytes() == before
    result = summary(run)
    assert result["state"] == "finished"
    # the earlier version went on to 0.6027; kernels of another processor differ a little
    assert result["rounds"][1]["valid_acc"] == pytest.approx(0.6027, abs=0.03)


def test_a_finished_run_is_shown_and_trained_further(folder: Path) -> None:
    run = folder / "finished"
    shown = gammaslim("prune", *OPTIONS, "--rounds", 1, "--output", run)
    assert shown.code == 0, shown
    assert "finished" in shown.out
    more = gammaslim("prune", *OPTIONS, "--rounds", 2, "--output", run)
    assert more.code == 0, more
    assert len(summary(run)["rounds"]) == 2


def test_commands_read_the_models_of_old_runs(folder: Path, tmp_path: Path) -> None:
    run = folder / "finished"
    stated = summary(run)["rounds"][0]["valid_acc"]
    done = gammaslim("evaluate", run, "--split", "validation", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["accuracy"] == pytest.approx(stated, abs=2e-3)
    for command in (
        ("inspect", run),
        ("report", run, folder / "stopped", "--output", tmp_path / "report.html"),
        ("export", run, "--format", "state-dict", "--output", tmp_path / "weights.pt"),
        ("slim", run, "--output", tmp_path / "slim", "--target", "macs=0.8"),
    ):
        done = gammaslim(*command)
        assert done.code == 0, done
