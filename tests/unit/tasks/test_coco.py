"""Images and boxes as COCO lays them out, and files that are damaged, hostile, or do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from job.data.preprocessing import Preprocessing
from job.errors import DataError, InputNotFound
from job.tasks.coco import class_names_of, find_files, labels_of
from job.tasks.detection import Detection
from job.tasks.image_task import TaskOptions
from support.coco import draw, json_file, write_coco, write_json


def options(data: Path, **more: Any) -> TaskOptions:
    return TaskOptions(str(data), Preprocessing.of("small", 32), **more)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), {"train": 5, "val": 3, "test": 2})


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "data"))


def test_boxes_are_those_of_the_file(written: Path) -> None:
    task = Detection(options(written))
    assert task.class_names == ("__background__", "disc", "square")
    assert task.testing is not None
    assert [len(each) for each in (task.training, task.validation, task.testing)] == [5, 3, 2]
    image, target = task.validation.sample(1, 0)
    drawn, boxes = draw(7)
    assert (image.numpy().transpose(1, 2, 0) == np.array(drawn)).all()
    assert target["labels"].tolist() == [label for label, _ in boxes]
    for found, (_, (left, top, width, height)) in zip(target["boxes"], boxes, strict=True):
        expected = torch.tensor([left, top, left + width, top + height])
        torch.testing.assert_close(found, expected)
    assert len(task.validation.sample(0, 0)[1]["boxes"]) == 0


def test_half_of_the_training_images_are_mirrored_with_their_boxes(written: Path) -> None:
    task, mirrored = Detection(options(written)), 0
    plain, target = task.training.split.image(1), task.training.targets[1]
    for seed in range(40):
        image, found = task.training.sample(1, seed)
        same = (image.numpy().transpose(1, 2, 0) == np.array(plain)).all()
        mirrored += not same
        left, right = target.boxes[:, 0], target.boxes[:, 2]
        if not same:
            left, right = plain.width - right, plain.width - left
        np.testing.assert_allclose(found["boxes"][:, 0], left, atol=1e-4)
        np.testing.assert_allclose(found["boxes"][:, 2], right, atol=1e-4)
        assert torch.equal(image, task.training.sample(1, seed)[0])
    assert 10 < mirrored < 30


def test_reduced_images_have_reduced_boxes(written: Path) -> None:
    wide, small = (
        Detection(options(written, cache_max_side=side)).validation.sample(1, 0)
        for side in (None, 30)
    )
    assert max(small[0].shape) == 30
    share = small[0].shape[2] / wide[0].shape[2]
    torch.testing.assert_close(small[1]["boxes"][:, 0], wide[1]["boxes"][:, 0] * share)


def test_a_tenth_is_held_out_of_one_file(tmp_path: Path) -> None:
    write_coco(tmp_path, {"train": 20})
    task = Detection(options(tmp_path, seed=3))
    assert (len(task.training), len(task.validation)) == (18, 2)
    assert task.fingerprint != Detection(options(tmp_path, seed=4)).fingerprint
    change(tmp_path, lambda c: c["annotations"][0].update(bbox=[1, 1, 9, 9]))
    assert task.fingerprint != Detection(options(tmp_path, seed=3)).fingerprint


def change(data: Path, work: Any, split: str = "train") -> None:
    content = json.loads(json_file(data, split).read_text())
    work(content)
    write_json(data, split, content)


def test_images_and_files_may_lie_in_one_folder_a_split(written: Path, tmp_path: Path) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        shutil.copytree(written / f"{split}2017", tmp_path / name)
        shutil.copy(json_file(written, split), tmp_path / name / "_annotations.coco.json")
    task = Detection(options(tmp_path))
    assert (len(task.training), len(task.validation)) == (5, 3)
    single = Detection(options(tmp_path / "train" / "_annotations.coco.json", seed=1))
    assert (len(single.training), len(single.validation)) == (4, 1)


def test_other_files_of_coco_are_not_read(data: Path) -> None:
    (data / "annotations" / "captions_train2017.json").write_text("{}")
    assert find_files(data)["training"] == json_file(data)


def test_labels_are_the_ids_of_categories_or_their_places() -> None:
    """As those of torchvision's weights: COCO has 80 categories up to 90."""
    assert labels_of({1: "a", 3: "b"}) == {1: 1, 3: 3}
    assert class_names_of({1: "a", 3: "b"}) == ("__background__", "a", "N/A", "b")
    assert labels_of({0: "a", 1: "b"}) == {0: 1, 1: 2}
    assert class_names_of({0: "a", 900: "b"}) == ("__background__", "a", "b")


def first_box(**values: Any) -> Any:
    return lambda content: content["annotations"][0].update(values)


def first_image(**values: Any) -> Any:
    return lambda content: content["images"][0].update(values)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (first_box(bbox=[1, 2, 3]), "'bbox' must be left, top, width, height; got"),
        (first_box(bbox=[1, 2, True, 3]), "'bbox' must be left, top, width, height; got"),
        (first_box(bbox=[1, 2, -3, 3]), "a size cannot be negative or huge"),
        (first_box(bbox=[1, 2, 1e300, 3]), "a size cannot be negative or huge"),
        (first_box(bbox=[float("nan"), 2, 3, 3]), "a size cannot be negative or huge"),
        (first_box(bbox=[10**400, 2, 3, 3]), "a size cannot be negative or huge"),
        (first_box(image_id=999), "has a box in the image 999, which it does not list"),
        (first_box(image_id="1"), "'image_id' must be a whole number; got '1'"),
        (first_box(category_id=9), "has a box of the category 9"),
        (first_box(iscrowd=7), "'iscrowd' is 7: 0 or 1"),
        (first_image(id=2), "has two images with the id 2"),
        (first_image(file_name="../val2017/0006.png"), "names an image outside of the data"),
        (first_image(file_name="/etc/passwd"), "names an image outside of the data"),
        (first_image(file_name="none.png"), "lists none.png, which is in none of"),
        (lambda c: c["images"][1].update(file_name="none.png"), "lists none.png, which .* lacks"),
        (lambda c: c["images"][1].update(file_name="0001.png"), "lists train2017/0001.png twice"),
        (first_image(width=3), r"says that train2017/0001.png has 3 x \d+ pixels, but it has"),
        (lambda c: c.update(images=[]), "has no images"),
        (lambda c: c.update(annotations=[]), "no training image has a box"),
        (lambda c: c.update(annotations={}), "'annotations' must be a list of objects"),
        (lambda c: c["categories"][1].update(id=1), "has two categories 1"),
        (lambda c: c["categories"][1].update(name="ball"), "has the category 2, square, which"),
        (lambda c: c.pop("categories"), "'categories' must be a list of objects"),
    ],
)
def test_a_file_that_does_not_fit_is_named(data: Path, work: Any, message: str) -> None:
    change(data, work)
    with pytest.raises(DataError, match=message) as error:
        Detection(options(data))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"\xff\xfe\x00", b"7"])
def test_what_is_no_coco_file_is_named(data: Path, content: bytes) -> None:
    json_file(data).write_bytes(content)
    with pytest.raises(DataError, match=r"instances_train2017.json (cannot be read|is not a COCO)"):
        Detection(options(data))


def test_a_folder_without_files_is_named(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputNotFound, match="does not exist"):
        Detection(options(tmp_path / "nothing"))
    with pytest.raises(DataError, match="has no JSON file of boxes: give a folder as COCO has it"):
        Detection(options(data / "train2017"))
    shutil.copy(json_file(data), json_file(data, year="2014"))
    with pytest.raises(DataError, match=r"has two training files, instances_train2014.json and"):
        Detection(options(data))


def test_an_image_that_cannot_be_read_is_named(data: Path) -> None:
    (data / "train2017" / "0002.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0002.png"):
        Detection(options(data))
    assert len(Detection(options(data, on_bad_image="skip")).training) == 4


def test_boxes_are_clipped_at_the_edge_and_those_without_an_area_are_left_out(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    width, height = Image.open(data / "train2017" / "0002.png").size
    boxes = [[-5, -5, 15, 15], [width - 4, 0, 40, 9], [1, 1, 0, 5], [width + 3, 0, 9, 9]]

    def add(content: Any) -> None:
        entries = [{"id": n, "image_id": 2, "category_id": 1, "bbox": b, "iscrowd": n == 0}
                   for n, b in enumerate(boxes)]  # fmt: skip
        content["annotations"] = entries

    change(data, add)
    target = Detection(options(data)).training.targets[1]
    assert target.boxes.tolist() == [[0, 0, 10, 10], [width - 4, 0, width, 9]]
    assert target.crowd.tolist() == [True, False]
    said = capsys.readouterr().err
    assert "instances_train2017.json: 2 boxes are outside of its image: clipped" in said
    assert "2 boxes are without an area: left out" in said
    assert height > 9
