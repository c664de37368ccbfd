"""``predict`` of the built-in tasks: a CSV of classes, masks, and COCO's JSON of boxes."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from job.artifacts.model_card import ModelCard, save_model
from job.cli.command_options import ModelOptions, PredictOptions
from job.cli.predict import predict
from job.data.geometry import Resize
from job.data.preprocessing import Preprocessing
from job.errors import DataError, UsageError
from job.models.detectors import as_detector, detector_preprocessing
from job.tasks.segmentation import IGNORED, mask_of_image
from support import coco
from support.shapes import rgb_unet


class Brightness(nn.Module):
    """Logits of two classes: the mean of an image, and its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = (images.mean((1, 2, 3)) - 0.5) * self.scale
        return torch.stack([bright, -bright], 1)


def save(folder: Path, network: nn.Module, task: str, names: tuple[str, ...], **more: Any) -> None:
    how = more.pop("how", Preprocessing.of("small", 32))
    card = ModelCard(more["model"], {}, len(names), class_names=names, preprocessing=how, task=task)
    save_model(folder, network, card)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    nets = SimpleNamespace(unet=rgb_unet, ssd=coco.ssd, labels=lambda: Brightness())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nets", nets)
    (tmp_path / "images" / "more").mkdir(parents=True)
    Image.new("RGB", (40, 24), (250, 250, 250)).save("images/2.png")
    Image.new("RGB", (24, 40), (5, 5, 5)).save("images/more/10.png")
    return tmp_path


def run(output: str, data: str | None = "images", **more: Any) -> None:
    options = PredictOptions(data=data, device="cpu", workers=0, **more)
    predict(ModelOptions(path="model"), options, output)


def test_multi_label_writes_the_classes_of_each_image(here: Path) -> None:
    save(here / "model", Brightness(), "multi-label", ("light", "dark"), model="nets:labels")
    run("labels.csv")
    with Path("labels.csv").open() as file:
        header, one, two = csv.reader(file)
    assert header == ["file", "labels", "light", "dark"]
    assert one[:2] == ["2.png", "light"]
    assert two[:2] == ["more/10.png", "dark"]
    # white below zero padding: 24 of 32 rows are bright
    bright = 8 * (250 / 255 * 24 / 32 - 0.5)
    assert float(one[2]) == pytest.approx(1 / (1 + np.exp(-bright)), abs=1e-5)
    assert float(one[2]) + float(one[3]) == pytest.approx(1, abs=1e-5)


def test_segmentation_writes_masks_of_the_size_of_images(here: Path) -> None:
    torch.manual_seed(0)
    network = rgb_unet(3).eval()
    save(here / "model", network, "segmentation", ("a", "b", "c"), model="nets:unet")
    run("masks")
    mask = np.array(Image.open("masks/2.png"))
    assert mask.shape == (24, 40)
    assert Image.open("masks/more/10.png").size == (24, 40)
    how = Preprocessing.of("small", 32)
    image = torch.from_numpy(np.array(how.evaluate(Image.open("images/2.png"))))
    with torch.no_grad():
        classes = network(how.to_input(image[None])).argmax(1)[0].numpy()
    assert (mask[:, 4:36] == classes[4:28]).all()
    assert (mask[:, :4] == IGNORED).all()  # outside of the crop
    with pytest.raises(UsageError, match="masks need a folder"):
        run("-")


@pytest.mark.parametrize("preset", ["small", "imagenet"])
@pytest.mark.parametrize("size", [(31, 50), (64, 40), (20, 20), (9, 700)])
def test_a_mask_returns_to_its_place(preset: str, size: tuple[int, int]) -> None:
    """Columns and rows of a ramp are where they were, up to a pixel of the resized image."""
    how = Preprocessing.of(preset, 32, interpolation="nearest", resize=Resize(36))
    for axis in (0, 1):
        ramp = np.linspace(0, 200, size[1 - axis]).astype(np.uint8)
        image = np.broadcast_to(ramp[:, None] if axis == 0 else ramp, size[::-1])
        made = np.array(how.evaluate(Image.fromarray(np.stack([image] * 3, 2))))[..., 0]
        mask = mask_of_image(made, size, how)
        inside = mask != IGNORED
        assert inside.any()
        step = 200 / min(size[1 - axis], 36) + 1
        assert abs(mask[inside].astype(int) - image[inside]).max() <= step


def detector(folder: Path) -> Any:
    torch.manual_seed(0)
    network: Any = as_detector("ssd", coco.ssd(3)).eval()
    names = "__background__", "disc", "square"
    how = detector_preprocessing(network, None)
    save(folder, network, "detection", names, model="nets:ssd", how=how)
    return network


def test_detection_writes_results_of_coco(here: Path) -> None:
    network = detector(here / "model")
    run("found.json")
    found = json.loads(Path("found.json").read_text())
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(Image.open("images/2.png"))).permute(2, 0, 1) / 255
        (expected,) = network([pixels])
    mine = [each for each in found if each["file_name"] == "2.png"]
    assert [each["score"] for each in mine] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
    left, top, right, bottom = expected["boxes"][0].tolist()
    assert mine[0]["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=2e-3)
    assert {each["image_id"] for each in found} <= {0, 1}


def test_results_have_the_ids_of_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector(here / "model")
    data = coco.write_coco(here / "data", {"train": 2, "val": 3})
    run("found.json", str(data))
    found = json.loads(Path("found.json").read_text())
    assert {each["image_id"] for each in found} == {3, 4, 5}
    assert {each["category_id"] for each in found} <= {1, 2}
    assert "file_name" not in found[0]
    assert "3 predictions of" in "".join(capsys.readouterr())
    with pytest.raises(UsageError, match="has no testing split; --split can be training, valid"):
        run("found.json", str(data), split="test")
    coco.write_json(data, "val", json.loads(coco.json_file(data).read_text()) | {
        "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "ball"}],
    })  # fmt: skip
    with pytest.raises(DataError):
        run("found.json", str(data))


def test_what_does_not_fit_is_named(here: Path) -> None:
    detector(here / "model")
    with pytest.raises(UsageError, match="predict needs --data for the task detection"):
        run("found.json", None)
    with pytest.raises(UsageError, match="--format kaggle is for classification"):
        run("found.json", format="kaggle")
    with pytest.raises(UsageError, match=r"--split test.* has no effect on a folder of images"):
        run("found.json", split="test")
    save(here / "model", coco.ssd(3), "nets:Own", ("a", "b", "c"), model="nets:ssd")
    with pytest.raises(UsageError, match="predict takes models of --task multi-label, segmenta"):
        run("found.json")
