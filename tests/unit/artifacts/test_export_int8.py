"""``export --int8``: 8-bit ONNX models, and their accuracies before and after."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml

import job
from job.artifacts.export_card import ExportedModel, Quantisation, export_readme
from job.artifacts.export_onnx import onnx_bytes
from job.artifacts.json_records import from_json
from job.artifacts.model_card import read_card
from job.artifacts.onnx_int8 import OnnxNetwork, quantise
from job.artifacts.records import RoundRecord
from job.cli import export_int8
from job.errors import DataError, UsageError
from support.brightness import NAMES, call, put, write_run
from support.cuts import save_slim_student


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, torch.nn.Module]:
    """The ONNX model of a network with convolutions, and the network."""
    folder = save_slim_student(tmp_path_factory.mktemp("slim") / "model")
    network = job.load(folder)
    return onnx_bytes(network, read_card(folder))[0], network


def test_an_8_bit_model_computes_nearly_the_same(slim: tuple[bytes, torch.nn.Module]) -> None:
    plain, network = slim
    batches = torch.randn(4, 8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    content = quantise(plain, iter(batches))
    model = onnx.load_from_string(content)
    weights = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8]
    assert len([w for w in weights if len(w.dims) == 4]) == 15  # each convolution
    assert max(np.abs(onnx.numpy_helper.to_array(w).astype(int)).max() for w in weights) <= 64
    kept = {entry.key: entry.value for entry in model.metadata_props}
    before = onnx.load_from_string(plain).metadata_props
    assert kept == {entry.key: entry.value for entry in before}
    with torch.no_grad():
        for images in (batches[0], batches[1][:3]):
            expected, actual = network(images), OnnxNetwork(content)(images)
            assert 0 < (actual - expected).norm() / expected.norm() < 0.1


def test_errors_of_the_images_are_their_own(slim: tuple[bytes, torch.nn.Module]) -> None:
    def broken() -> object:
        yield torch.zeros(1, 3, 48, 48)
        raise DataError("a.png is damaged")

    with pytest.raises(DataError, match=r"a\.png"):
        quantise(slim[0], broken())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--int8 cannot quantise this network"):
        quantise(b"no model", [])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose network tells numbers by the brightness of an image, without an error."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        names = [f"{split}/{number}/0.png" for split in ("train", "val")]
        put(tmp_path / "data", *names, level=number)
    return write_run(tmp_path / "run", str(tmp_path / "data"))


def test_both_accuracies_are_printed_and_in_the_model_card(run: Path, tmp_path: Path) -> None:
    done = call("export", run, "--output", tmp_path / "m.onnx", "--int8", "--workers", 0)
    assert done.exit_code == 0, done.output
    levels = np.array([int(name) for name in NAMES], np.float32) * 20 / 255
    images = np.tile(levels[:, None, None, None], (1, 3, 32, 32))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    after = float((logits.argmax(1) == np.arange(12)).mean())
    assert "calibrated on 12 images" in done.output
    found = re.search(r"accuracy (\S+) before, (\S+) after \((\S+) points\)", done.output)
    assert found
    assert found.groups() == ("1.0000", f"{after:.4f}", f"{100 * (after - 1) + 0.0:+.2f}")
    text = (tmp_path / "README.md").read_text()
    assert "It is quantised: int8, calibrated on 12 images." in text
    size = (tmp_path / "m.onnx").stat().st_size
    plain = tmp_path / "plain" / "m.onnx"
    assert call("export", run, "--output", plain).exit_code == 0
    assert f"| accuracy on the validation split | {after:.2%} | 100.00% |  |  |" in text
    assert f"| bytes of the file | {size:,} | {plain.stat().st_size:,} |  |  |" in text
    assert str(tmp_path) not in text  # it may be published
    (result,) = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": after}]


def test_the_card_has_the_numbers_of_the_8_bit_file_not_those_before(tmp_path: Path) -> None:
    folder = save_slim_student(tmp_path / "run" / "rounds" / "01")
    record = {"round": 1, "width": 0.5, "channels": 9, "params": 10, "macs": 20, "bytes": 991_072,
              "valid_acc": 0.8783, "valid_loss": 0.5, "step": 3}  # fmt: skip
    card = replace(read_card(folder), metrics=record)
    base = from_json(RoundRecord, record | {"round": 0, "valid_acc": 0.9}, lenient=True)
    data = {"root": "/home/me/photos", "training": 9, "validation": 4}
    int8 = Quantisation("int8", (1_000_000, 345_782), (0.88, 0.875), "validation")
    exported = ExportedModel("m.onnx", "onnx", card, data, base, int8)

    text = export_readme(exported)
    assert "value: 0.875}" in text
    assert "| accuracy on the validation split | 87.50% | 88.00% | 90.00% | -2.50 points |" in text
    assert "| bytes of the file | 345,782 | 1,000,000 |" in text
    assert "991,072" not in text
    assert "0.8783" not in text

    other = replace(int8, split="testing", data={"root": "/home/me/other"})
    text = export_readme(replace(exported, int8=other))
    assert 'dataset: {name: "other", type: image-folder, split: testing}' in text
    assert "| accuracy on the testing split of other | 87.50% | 88.00% |  |  |" in text

    text = export_readme(replace(exported, int8=replace(int8, scores=None, split="")))
    assert "model-index" not in text
    assert "metrics:" not in text
    assert "| accuracy on the validation split | not measured | 87.83% | 90.00% |  |" in text


def test_images_without_labels_calibrate_too(run: Path, tmp_path: Path) -> None:
    put(tmp_path / "plain", *(f"{number}.png" for number in range(3)), level=4)
    done = call(
        "export", run, "--output", tmp_path / "m.onnx", "--int8", "--workers", 0,
        "--data", tmp_path / "plain",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "accuracy not measured" in done.output
    assert "has no labels" in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("m.pt", "--int8"), "--int8 needs --format onnx, not state-dict"),
        (("m.onnx", "--data", "x"), "--data has no effect without --int8"),
        (("m.onnx", "--calibration-images", 3), "--calibration-images has no effect"),
        (("m.onnx", "--int8", "--data", ""), "--data is empty"),
    ],
)
def test_options_that_contradict_each_other_say_what_to_type(
    run: Path, capsys: pytest.CaptureFixture[str], args: tuple[object, ...], message: str
) -> None:
    done = call("export", run, "--output", *args)
    assert done.exit_code == 2
    assert message in done.output + capsys.readouterr().err
    assert not Path(str(args[0])).exists()


def test_without_onnxruntime_the_package_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_int8, "find_spec", lambda _name: None)
    done = call("export", run, "--output", "m.onnx", "--int8")
    assert done.exit_code == 2
    assert "pip install 'gammaslim[onnx]'" in done.output
