"""ONNX models whose weights are too large for one file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import job
from job.artifacts import export_onnx
from job.artifacts.export import random_inputs
from job.artifacts.model_card import read_card
from job.errors import UsageError
from support.brightness import call
from support.cuts import save_slim_student


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder; what fits into one file is less than its weights."""
    monkeypatch.setattr(export_onnx, "ONE_FILE", 1000)
    return save_slim_student(tmp_path / "model")


def test_the_weights_of_a_large_model_are_in_a_file_beside_it(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a b" / "large.onnx"
    path.parent.mkdir()
    call("export", model, "--output", path)
    assert {file.name for file in path.parent.iterdir()} >= {"large.onnx", "large.onnx.data"}
    assert not list(path.parent.glob(".*"))
    network, card = job.load(model), read_card(model)
    weights = sum(tensor.nbytes for tensor in network.parameters())
    assert path.with_name("large.onnx.data").stat().st_size > 0.5 * weights  # some are too small
    loaded = onnx.load(path, load_external_data=False)
    assert {entry.key for entry in loaded.metadata_props} >= {"model", "class_names", "input"}
    images = random_inputs(card, 3)
    with torch.no_grad():
        torch.testing.assert_close(export_onnx.open_onnx(str(path))(images), network(images))


def test_what_needs_one_file_says_that_the_model_is_too_large(model: Path) -> None:
    with pytest.raises(UsageError, match="2 GiB or more"):
        export_onnx.onnx_bytes(job.load(model), read_card(model))
