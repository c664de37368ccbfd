"""The model of an epoch's time agrees with published figures and with itself."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torchvision

from support.commands import ROOT


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    return importlib.import_module("scaling")


def test_the_layers_of_a_network_have_its_multiply_adds(scaling: Any) -> None:
    layers = scaling.layers_of(torchvision.models.resnet50(), 224)
    assert sum(layer.macs for layer in layers) == pytest.approx(4.09e9, rel=0.01)
    assert sum(layer.norm for layer in layers) == 53


def test_published_speeds_are_met_within_a_fifth_and_more_gpus_take_less_time(
    scaling: Any, tmp_path: Path
) -> None:
    scaling.main(["predict", "--output", str(tmp_path / "scaling.json")])
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    ratios = [row["model / published"] for row in rows if "published" in row]
    assert len(ratios) == 2
    assert all(0.8 < ratio < 1.2 for ratio in ratios), ratios
    for name in ("StudentNet", "ResNet-50"):
        own = [row for row in rows if row["network"] == name and "published" not in row]
        seconds = [row["epoch warm (s)"] for row in own]
        assert seconds == sorted(seconds, reverse=True)
        assert all(0.5 < row["of linear"] <= 1 for row in own)
        assert all(row["epoch cold (s)"] >= row["epoch warm (s)"] for row in own)


def test_the_check_measures_two_processes_against_two_alone(
    scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {(1, 1): 50.0, (2, 1): 80.0, (1, 2): 72.0}  # by jobs at once and processes of each
    monkeypatch.setattr(scaling, "run_all", lambda *a: speeds[a[-2:]])
    monkeypatch.setattr(scaling, "write_photos", lambda *a: None)
    monkeypatch.setattr(scaling, "reductions", lambda: (0.0, 0.04))
    args = argparse.Namespace(folder=None, images=320, turns=1, batch=32)
    together, model = scaling.check(args)[2:]
    assert together["of two alone"] == 0.9
    assert model["images/s"] == pytest.approx(32 / (32 / 80 + 0.04))
