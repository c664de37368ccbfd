"""The accuracy benchmark measures a small network, and does not measure a cell twice."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.commands import ROOT


def test_a_small_network_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    accuracy, networks = map(importlib.import_module, ("accuracy", "networks"))
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = generator.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    weights, output = tmp_path / "weights.pt", tmp_path / "cells.jsonl"
    torch.save(networks.build("resnet20", 2).state_dict(), weights)
    command = [
        "accuracy.py", "--network", "resnet20", "--weights", str(weights), "--images",
        str(tmp_path), "--count", "8", "--targets", "0.5", "--methods", "allocate local",
        "--seeds", "1", "--epochs", "1", "--output", str(output),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    accuracy.measure(accuracy.options())
    (cell,) = rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert cell["macs"] <= 0.5
    assert all(0 <= cell[stage] <= 100 for stage in ("base", "after cut", "after 1 epochs"))
    assert "| macs 0.5 | allocate local |" in accuracy.table(rows)
    accuracy.measure(accuracy.options())
    assert len(output.read_text("utf-8").splitlines()) == 1
