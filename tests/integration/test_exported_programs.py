"""Exported programs run where nothing is known of the network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

import job
import job.artifacts.export
from job.artifacts.model_card import ModelCard, save_model
from job.cli.command_options import ModelOptions
from job.cli.export import export
from job.data.preprocessing import Preprocessing
from job.models.factory import build_network
from support.cuts import NAMES, randomise, save_slim_student


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_slim_student(tmp_path_factory.mktemp("slim") / "model")


RELOAD = """
import json, sys
sys.modules["job"] = None  # cannot be imported
import torch
extra = {"gammaslim.json": ""}
network = torch.export.load("m.pt2", extra_files=extra).module()
images = torch.load("images.pt", weights_only=True)
torch.save([network(batch) for batch in images], "logits.pt")
print(json.loads(extra["gammaslim.json"])["class_names"])
"""


def test_an_exported_program_needs_no_code_of_the_network(slim: Path, tmp_path: Path) -> None:
    export(ModelOptions(str(slim)), str(tmp_path / "m.pt2"))
    batches = [torch.randn(count, 3, 48, 48) for count in (1, 2, 5)]
    torch.save(batches, tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", RELOAD], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout == f"{list(NAMES)}\n", done.stderr
    network = job.load(slim)
    for batch, given in zip(batches, torch.load(tmp_path / "logits.pt"), strict=True):
        torch.testing.assert_close(given, network(batch))


@pytest.mark.parametrize(("format", "name"), [("onnx", "m.onnx"), ("torch-export", "m.pt2")])
def test_batchnorms_that_select_their_channels_are_exported_too(
    tmp_path: Path, format: str, name: str
) -> None:
    torch.manual_seed(0)
    network = randomise(build_network("densenet40-cifar", 3, {}))
    narrow, plan = job.slim(network, torch.rand(1, 3, 32, 32), target="macs=0.4", min_keep=0)
    card = ModelCard("densenet40-cifar", {}, 3, preprocessing=Preprocessing.of("small", 32))
    save_model(tmp_path / "slim", narrow, card.cut(plan.layers, plan.width))
    assert any(kept.select for kept in plan.layers.values())
    export(ModelOptions(str(tmp_path / "slim")), str(tmp_path / name), format)
    images = torch.rand(3, 3, 32, 32)
    if format == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    else:
        logits = torch.export.load(tmp_path / name).module()(images)
    torch.testing.assert_close(logits, narrow(images), atol=1e-4, rtol=0)
