"""``slim`` and ``export`` on a command line: what they measure, assume, and say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import job
from job.artifacts.export import format_of
from job.artifacts.model_card import ModelCard, save_model
from job.cli.main import gammaslim
from job.data.preprocessing import Preprocessing
from job.models.factory import build_network
from support.cuts import randomise
from support.datasets import draw_image, write_flat


def command(*args: object) -> Result:
    return CliRunner().invoke(gammaslim, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small StudentNet of three classes at 32 pixels."""
    folder = tmp_path_factory.mktemp("model") / "base"
    card = ModelCard(
        "student",
        {"base": 4},
        3,
        preprocessing=Preprocessing.of("small", 32),
        class_names=("0", "1", "2"),
    )
    torch.manual_seed(0)
    save_model(folder, randomise(card.build()), card)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flat(tmp_path_factory.mktemp("data"), {"training": 8, "validation": 5}, size=32)


def test_without_images_accuracy_is_said_to_be_unmeasured(model: Path, tmp_path: Path) -> None:
    done = command("slim", model, "--output", tmp_path / "slim", "--target", "macs=0.5")
    assert done.exit_code == 0, done.output
    first, *_, verified, last = done.stdout.splitlines()
    assert first == "importance gamma, compensation none: there are no calibration images"
    assert verified.startswith("the cut is verified in float64: relative error ")
    assert last.startswith("accuracy was not measured: --data PATH")
    for option, value in (
        ("--importance", "refit"), ("--compensate", "mean"), ("--recalibrate", 2),
    ):  # fmt: skip
        done = command("slim", model, "--output", tmp_path / "other", option, value)
        assert done.exit_code == 2
        assert f"Error: {option}" in done.stderr
        assert "add --data PATH" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_target_that_is_met_already_is_told(model: Path, tmp_path: Path) -> None:
    """It is a fraction of the network before its first cut."""
    done = command("slim", model, "--output", tmp_path / "slim", "--target", "macs=0.5")
    assert "nothing was cut" not in done.output
    done = command("slim", tmp_path / "slim", "--output", tmp_path / "same", "--target", "macs=0.8")
    assert done.exit_code == 0, done.output
    assert (
        "nothing was cut: the network meets --target macs=0.8, of the network before its first "
        "cut, already" in done.stdout
    )


FLOAT32_ONLY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.conv(x.float()).relu().mean((2, 3)))
"""


def test_the_precision_of_the_proof_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "float32_nets.py").write_text(FLOAT32_ONLY)
    monkeypatch.syspath_prepend(tmp_path)
    network = build_network("float32_nets:Net", 3, {})
    torch.save(network.state_dict(), tmp_path / "w.pt")
    args = ("--model", "float32_nets:Net", "--image-size", 16, "--importance", "l2")
    done = command("slim", tmp_path / "w.pt", "--output", tmp_path / "slim", *args)
    assert done.exit_code == 0, done.output
    assert "the cut is verified in float32: relative error " in done.stdout


def accuracy(folder: Path, data: Path, split: str) -> float:
    args = ("evaluate", folder, "--data", data, "--split", split, "--json", "--workers", 0)
    record = json.loads(command(*args).stdout)
    return float(record["accuracy"])


@pytest.mark.parametrize("held_out", [False, True])
def test_with_labelled_images_accuracy_is_measured_before_and_after(
    model: Path, images: Path, tmp_path: Path, held_out: bool
) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    if held_out:
        shutil.rmtree(data / "validation")
    done = command(
        "slim", model, "--output", tmp_path / "slim", "--target", "macs=0.5", "--data", data,
        "--workers", 0, "--recalibrate", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    first, *_, last = done.stdout.splitlines()
    method = "importance refit, compensation regress, allocation outputs"
    assert first == f"{method}: by the calibration images"
    count = 3 if held_out else 15
    before = accuracy(model, data, "validation")
    after = accuracy(tmp_path / "slim", data, "validation")
    assert last == (
        f"accuracy on the validation split of {data} ({count} images): {before:.4f} before, "
        f"{after:.4f} after ({100 * (after - before):+.2f} points)"
    )
    card = json.loads((tmp_path / "slim" / "model.json").read_text())
    assert card["metrics"] == {"validation": after}


def test_images_without_labels_calibrate(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "any" / "deeper").mkdir(parents=True)
    for number in range(6):
        draw_image(rng, number % 3, 40, 30).save(
            tmp_path / "any" / "deeper" / f"holiday {number}.png"
        )
    done = command(
        "slim", model, "--output", tmp_path / "slim", "--data", tmp_path / "any", "--workers", 0
    )
    assert done.exit_code == 0, done.output
    assert "importance refit, compensation regress" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        f"accuracy was not measured: {tmp_path / 'any'} has no labels"
    )
    assert "no effect" not in done.output
    done = command(
        "slim", model, "--output", tmp_path / "alike", "--data", tmp_path / "any", "--workers", 0,
        "--policy", "uniform", "--allocate", "outputs",
    )  # fmt: skip
    assert "--allocate outputs has no effect without --policy global" in done.output
    plain = command("slim", model, "--output", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    image = torch.rand(1, 3, 32, 32)
    assert not torch.equal(job.load(tmp_path / "slim")(image), job.load(tmp_path / "plain")(image))
    done = command(
        "slim", model, "--output", tmp_path / "x", "--data", tmp_path / "any", "--workers", 0,
        "--importance", "taylor",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "taylor needs calibration images with labels" in done.stderr


def test_images_of_more_numbered_classes_calibrate_without_labels(
    model: Path, tmp_path: Path
) -> None:
    data = write_flat(tmp_path / "data", {"training": 2, "validation": 1}, classes=5, size=32)
    args = ("--data", data, "--workers", 0, "--target", "width=0.5")
    done = command("slim", model, "--output", tmp_path / "slim", *args)
    assert done.exit_code == 0, done.output
    last = done.stdout.splitlines()[-1]
    assert last.endswith("has a class 4, but the network has 3 classes, numbered from 0")


def test_classes_are_matched_by_name(model: Path, tmp_path: Path) -> None:
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for split, count in (("train", 3), ("val", 6)):
        for label, name in enumerate(("cat", "dog")):
            (data / split / name).mkdir(parents=True)
            for number in range(count + label):
                draw_image(rng, label, 32, 32).save(data / split / name / f"{number}.png")
    args = ("--data", data, "--workers", 0)
    done = command("slim", model, "--output", tmp_path / "slim", *args)
    assert done.exit_code == 0, done.output
    assert "accuracy was not measured: the model does not know the class 'cat'" in done.stdout
    card, own = json.loads((model / "model.json").read_text()), tmp_path / "own"
    shutil.copytree(model, own)
    (own / "model.json").write_text(json.dumps(card | {"class_names": ["dog", "emu", "cat"]}))
    done = command("slim", own, "--output", tmp_path / "other", *args)
    before = accuracy(own, data, "validation")
    assert 0 < before < 1
    assert f"accuracy on the validation split of {data} (13 images): {before:.4f}" in done.stdout


def test_a_weights_file_has_the_size_that_its_network_is_made_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("densenet40-cifar", "squeezenet1_1"):
        torch.save(build_network(name, 4, {}).state_dict(), tmp_path / name)

    def inspect(file: str, name: str, *args: object) -> Result:
        return command("inspect", tmp_path / file, "--json", "--model", name, *args)

    for name, size in (("densenet40-cifar", 32), ("squeezenet1_1", 224)):
        done = inspect(name, name)
        assert json.loads(done.stdout)["image_size"] == size
        assert f"input size: {size} pixels, which {name} is made for" in done.stderr
    factory = "torchvision.models:squeezenet1_1"
    done = inspect("squeezenet1_1", factory)
    assert done.exit_code == 2
    assert "is made for, e.g. --image-size 32" in done.stderr
    done = inspect("squeezenet1_1", factory, "--image-size", 64)
    assert json.loads(done.stdout)["image_size"] == 64
    assert "input size" not in done.stderr


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("m.ONNX", "onnx"), ("a.b/m.pt2", "torch-export"), ("m.safetensors", "state-dict"),
        ("m.pt", "state-dict"), ("m.bin", "state-dict"), ("a.onnx/m", "state-dict"),
    ],
)  # fmt: skip
def test_the_format_follows_from_the_suffix(name: str, format: str) -> None:
    assert format_of(Path(name), None) == format
    assert format_of(Path(name), format) == format
    assert format_of(Path("model.best"), format) == format


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--format", "state-dict", "--output", "m.onnx"), ".onnx is onnx; name the file m.safe"),
        (("--format", "onnx", "--output", "m.pt"), ".pt is state-dict; name the file m.onnx"),
        (("--format", "torch-export", "--output", "m.pth"), "name the file m.pt2"),
        (("--output", "m.tflite"), "unknown suffix .tflite; give --format, or one of .onnx"),
    ],
)
def test_contradictions_of_format_and_suffix_are_errors(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("export", model, *args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_recovery_is_reported_and_needs_images(model: Path, images: Path, tmp_path: Path) -> None:
    arguments = ("--target", "macs=0.5", "--recover", 2)
    done = command("slim", model, "--output", tmp_path / "none", *arguments)
    assert done.exit_code == 2
    assert "Error: --recover needs images: add --data PATH" in done.stderr
    done = command(
        "slim", model, "--output", tmp_path / "slim", *arguments, "--data", images, "--workers", 0
    )
    assert done.exit_code == 0, done.output
    *_, recovery, last = done.stdout.splitlines()
    assert recovery.startswith("recovery: accuracy ")
    after = accuracy(tmp_path / "slim", images, "validation")
    assert recovery.endswith(f" before, {after:.4f} after")
    assert f"{after:.4f} after (" in last
