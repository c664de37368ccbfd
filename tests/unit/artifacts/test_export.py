"""Exported networks give torch's own logits in programs that know nothing of this one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import job
import job.artifacts.export
import job.artifacts.export_onnx
from job.artifacts.model_card import ModelCard, save_model
from job.cli.command_options import ModelOptions
from job.cli.export import export
from job.data.preprocessing import Preprocessing
from job.errors import GammaslimError, UsageError
from job.models.factory import build_network
from support.cuts import NAMES, save_slim_student


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_slim_student(tmp_path_factory.mktemp("slim") / "model")


def test_onnx_gives_torchs_logits_for_any_batch(
    slim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(ModelOptions(str(slim)), str(tmp_path / "m.onnx"))
    said, card = capsys.readouterr().out.splitlines()
    assert card.startswith("model card: ")
    assert "student at width 0.5: onnxruntime gives the same logits" in said
    model = onnx.load(tmp_path / "m.onnx")
    assert model.opset_import[0].version >= 18
    values = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(values["class_names"]) == list(NAMES)
    assert json.loads(values["input"]) == Preprocessing.of("imagenet", 48).to_dict() | {
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    assert (values["model"], values["width"]) == ("student", "0.5")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape[1:] == [3, 48, 48]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    network = job.load(slim)
    for count in (1, 2, 5):
        images = np.random.default_rng(count).normal(size=(count, 3, 48, 48)).astype(np.float32)
        wanted = network(torch.from_numpy(images)).detach().numpy()
        (given,) = session.run(None, {"images": images})
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_what_differs_or_cannot_be_expressed_is_not_written(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    target = tmp_path / "m"
    target.write_text("of yesterday")
    with monkeypatch.context() as patch:
        patch.setattr(job.artifacts.export, "TOLERANCE", -1.0)
        with pytest.raises(GammaslimError, match=r"differs from torch by .*nothing is written"):
            export(ModelOptions(str(slim)), str(target), format)

    class Deciding(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            rows = images.flatten(1)
            return rows if rows.sum() > 0 else -rows

    card = ModelCard("student", {}, 3, preprocessing=Preprocessing.of("small", 8))
    monkeypatch.setattr("job.cli.export.open_model", lambda _: (Deciding(), card))
    with pytest.raises(UsageError, match=f"--format {format} cannot express") as caught:
        export(ModelOptions(str(slim)), str(target), format)
    assert "\n" not in str(caught.value)
    assert target.read_text() == "of yesterday"
    assert list(tmp_path.iterdir()) == [target]


def test_without_the_packages_the_extra_is_named(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.artifacts.export_onnx, "installed", lambda _: False)
    with pytest.raises(UsageError, match=r"pip install 'gammaslim\[onnx\]'"):
        export(ModelOptions(str(slim)), str(tmp_path / "m.onnx"), "onnx")


def test_torchvisions_normalised_network_is_exported_too(tmp_path: Path) -> None:
    card = ModelCard("squeezenet1_1", {}, 4, preprocessing=Preprocessing.of("imagenet", 64))
    torch.manual_seed(0)
    save_model(tmp_path / "model", card.build(), card)
    export(ModelOptions(str(tmp_path / "model")), str(tmp_path / "m.onnx"), "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 64, 64)
    wanted = job.load(tmp_path / "model")(images).detach().numpy()
    (given,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)


def test_the_width_of_another_network_is_told_in_four_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build_network("resnet18", 3, {})
    card = ModelCard(
        "resnet18", {}, 3, preprocessing=Preprocessing.of("small", 32), width=0.8573749999999999
    )
    save_model(tmp_path / "slim", network, card)
    export(ModelOptions(str(tmp_path / "slim")), str(tmp_path / "m.pt"))
    assert "resnet18 at width 0.8574: " in capsys.readouterr().out


class Centres(nn.Module):
    """A detector of a user's own, with two outputs."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.heat, self.size = nn.Conv2d(8, num_classes, 1), nn.Conv2d(8, 2, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.stem(images)
        return {"heat": self.heat(features), "size": self.size(features)}


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "xml", "mlpackage"])
def test_all_outputs_of_a_users_task_are_exported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    torch.manual_seed(0)
    network, made = Centres().eval(), Preprocessing.of("small", 16)
    card = ModelCard("nets:centres", {}, 3, preprocessing=made, task="shapes:Boxes")
    monkeypatch.setattr("job.cli.export.open_model", lambda _: (network, card))
    path = tmp_path / f"m.{suffix}"
    export(ModelOptions("weights.pt"), str(path))
    assert "gives the same heat, size: relative difference" in capsys.readouterr().out
    page = (tmp_path / "README.md").read_text()
    assert "Output: `heat`, `size`" in page
    assert "logits" not in page
    images = torch.rand(3, 3, 16, 16)
    expected = {name: values.detach() for name, values in network(images).items()}
    if suffix == "onnx":
        found = job.artifacts.export_onnx.open_onnx(str(path))(images)
    elif suffix == "pt2":
        found = torch.export.load(path).module()(images)
    else:
        return
    torch.testing.assert_close(found, expected)
