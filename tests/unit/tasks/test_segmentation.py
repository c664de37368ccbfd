"""The built-in task of images and masks in folders."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from job.artifacts.export import torch_export_bytes
from job.artifacts.model_card import ModelCard
from job.data.preprocessing import Preprocessing
from job.data.preprocessing_options import PreprocessingOptions
from job.errors import DataError, InputNotFound, UsageError
from job.models.factory import build_network
from job.tasks.image_task import TaskOptions
from job.tasks.masks import names_of_values
from job.tasks.segmentation import IGNORED, Segmentation
from support.shapes import draw, write_masks


def options(data: Path, how: Any = None, **more: Any) -> TaskOptions:
    return TaskOptions(str(data), how or Preprocessing.of("small", 32), **more)


@pytest.mark.parametrize("by_split", [True, False])
def test_masks_are_found_in_either_order_of_folders(tmp_path: Path, by_split: bool) -> None:
    data = write_masks(tmp_path, {"train": 4, "val": 2, "test": 1}, by_split=by_split)
    task = Segmentation(options(data))
    assert task.class_names == ("0", "1", "2")
    assert (len(task.training), len(task.validation)) == (4, 2)
    assert task.testing is not None
    image, mask = task.validation.sample(0, 0)
    true = draw(4)[1]
    assert (mask.numpy() == np.where(true < 0, IGNORED, true)).all()
    assert image.shape == (32, 32, 3)
    (tmp_path / "classes.txt").write_text("nothing\ndisc\nsquare\n")
    assert Segmentation(options(data)).class_names == ("nothing", "disc", "square")
    (tmp_path / "classes.txt").write_text("nothing\ndisc\n")
    with pytest.raises(DataError, match=r"names 2 classes, but .*\.png has class 2"):
        Segmentation(options(data))


def test_a_class_number_far_above_the_others_is_cautioned_about(tmp_path: Path) -> None:
    data = write_masks(tmp_path, {"train": 4, "val": 2})
    assert Segmentation(options(data)).caution is None
    path = sorted((data / "train" / "masks").iterdir())[1]
    mask = np.array(Image.open(path))
    mask[0, 0] = 17
    Image.fromarray(mask).save(path)
    task = Segmentation(options(data))
    assert len(task.class_names) == 18
    assert task.caution
    assert task.caution.startswith("no mask has a class between 2 and 17, which is in ")
    assert path.name in task.caution
    (data / "classes.txt").write_text("\n".join(f"class {number}" for number in range(18)))
    assert Segmentation(options(data)).caution is None


@pytest.mark.parametrize(
    ("values", "count"),
    [((0, 255), 2), ((255,), 1), ((1, 2, 3), 4), ((4,), 5), ((0, 1, 255), 2), ((0,), 1)],
)
def test_numbers_without_a_gap_are_classes(
    tmp_path: Path, values: tuple[int, ...], count: int
) -> None:
    shown_in = {value: f"{value}.png" for value in values}
    assert names_of_values(tmp_path, shown_in) == (tuple(map(str, range(count))), None)
    if count > 1:
        (tmp_path / "classes.txt").write_text("one\n")
        with pytest.raises(DataError, match=rf"names 1 classes, but .*png has class {count - 1}"):
            names_of_values(tmp_path, shown_in)


def test_a_tenth_is_held_out_of_folders_without_splits(tmp_path: Path) -> None:
    task = Segmentation(options(write_masks(tmp_path, {"": 20}), seed=3))
    assert (len(task.training), len(task.validation)) == (18, 2)
    assert task.fingerprint == Segmentation(options(tmp_path, seed=3)).fingerprint
    assert task.fingerprint != Segmentation(options(tmp_path, seed=4)).fingerprint


@pytest.mark.parametrize("preset", ["small", "homework", "imagenet"])
def test_a_mask_is_cropped_and_turned_with_its_image(tmp_path: Path, preset: str) -> None:
    """An image that shows its own mask still shows it, and padding has no class."""
    data = write_masks(tmp_path, {"train": 3, "val": 1}, side=40)
    for path in sorted((data / "train" / "masks").iterdir()):
        labels = np.array(Image.open(path))
        Image.fromarray(labels * 100 + 1).save(data / "train" / "images" / path.name)
    how = Preprocessing.of(preset, 32, interpolation="nearest")
    task = Segmentation(options(data, how))
    padded = 0
    for seed in range(40):
        image, mask = task.training.sample(seed % 3, seed)
        known = mask != IGNORED
        expected = mask.to(torch.uint8) * 100 + 1
        assert torch.equal(image[..., 0][known], expected[known])
        padded += int((image[..., 0] == 0).sum() > 0)
        assert (mask[image[..., 0] == 0] == IGNORED).all()
        assert torch.equal(mask, task.training.sample(seed % 3, seed)[1])
    assert (padded > 0) == (preset in ("small", "homework"))


def test_masks_of_black_and_white_have_two_classes(tmp_path: Path) -> None:
    data = write_masks(tmp_path, {"train": 3, "val": 1})
    for path in data.glob("*/masks/*.png"):
        labels = np.array(Image.open(path))
        Image.fromarray(((labels == 1) * 255).astype(np.uint8)).save(path)
    task = Segmentation(options(data))
    assert task.class_names == ("0", "1")
    masks = [task.training.sample(number, number)[1] for number in range(3)]
    assert {1} < set(torch.stack(masks).unique().tolist()) <= {0, 1, IGNORED}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "train/masks/0.png").unlink(), "0.png has no mask 0.png in"),
        (lambda d: Image.new("L", (8, 8)).save(d / "train/masks/1.png"), "8 x 8 pixels, its image"),
        (lambda d: Image.effect_noise((32, 32), 90).convert("RGB").point(
            list(range(256)) * 2 + [0] * 256).save(d / "train/masks/1.png"), "has colours"),
        (lambda d: (d / "train/masks/1.png").write_bytes(b"x"), "cannot be read as a mask"),
        (lambda d: (d / "train").rename(d / "other"), "has no training images"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_named(tmp_path: Path, break_it: Any, message: str) -> None:
    data = write_masks(tmp_path / "data", {"train": 2, "val": 1})
    break_it(data)
    with pytest.raises(DataError, match=message):
        Segmentation(options(data))
    with pytest.raises(DataError, match="has no images with masks: --task segmentation takes"):
        Segmentation(options(tmp_path / "data" / "val" / "images"))
    with pytest.raises(InputNotFound, match="does not exist"):
        Segmentation(options(tmp_path / "nothing"))


def test_loss_and_iou_are_those_of_their_definitions(tmp_path: Path) -> None:
    task = Segmentation(options(write_masks(tmp_path, {"train": 2, "val": 1})))
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4)).to(torch.uint8)
    targets[0, 0] = IGNORED
    loss, count = task.loss({"out": logits, "aux": logits}, targets)
    known = targets != IGNORED
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[known], targets[known].long())
    torch.testing.assert_close(loss / count, 1.5 * expected)
    with torch.no_grad():
        torch.testing.assert_close(task.loss([logits, logits], targets)[0] / count, expected)
    found = task.metrics(logits, targets)
    predicted = logits.argmax(1)
    for label in range(3):
        mine, true = (predicted == label) & known, targets == label
        assert int(found["miou"][0][label]) == int((mine & true).sum())
        assert int(found["miou"][1][label]) == int((mine | true).sum())
    small = F.avg_pool2d(logits, 2)  # a network with a stride
    assert task.metrics(small, targets)["pixel_acc"][1] == known.sum()
    assert task.distillation_loss(logits, logits, 2.0).item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(DataError, match=r"logits for 1 classes, but the masks have"):
        task.loss(torch.zeros(2, 1, *targets.shape[-2:]), targets)
    with pytest.raises(DataError, match=r"returns \(2, 3\): --task segmentation needs logits"):
        task.metrics(torch.rand(2, 3), targets)


class TwoOutputs(nn.Module):
    """A network with a dict of outputs, as torchvision's segmentation networks return."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, num_classes, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.last(self.body(images).relu())
        return {"aux": logits[:, :1], "out": logits}


def test_networks_of_torchvision_are_built_without_a_download() -> None:
    name = "lraspp_mobilenet_v3_large"
    network = build_network(name, 4, {}, classifier=False).eval()
    assert network(torch.rand(1, 3, 64, 64))["out"].shape == (1, 4, 64, 64)
    with pytest.raises(UsageError, match="--model 'lraspp_mobilenet_v3_large' is unknown"):
        build_network(name, 4, {})
    with pytest.raises(UsageError, match="needs the number of classes: pass --num-classes"):
        build_network(name, 0, {}, classifier=False)


def test_the_main_output_is_exported() -> None:
    made = PreprocessingOptions(image_size=16).resolve(16)
    card = ModelCard("nets:two", {}, 4, preprocessing=made, task="segmentation")
    content, how = torch_export_bytes(TwoOutputs(4).eval(), card)
    assert "relative difference" in how
    exported = torch.export.load(io.BytesIO(content)).module()
    assert exported(torch.rand(1, 3, 16, 16)).shape == (1, 4, 16, 16)
