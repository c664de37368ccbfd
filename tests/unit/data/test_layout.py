"""Folders are recognised by what is in them, and labels come from names, never from paths."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.data.dataset import Dataset, hold_out_validation
from job.data.folders import Lister, natural_key
from job.data.layout import LAYOUTS, Layout, open_data
from job.data.splits import UNLABELLED, ArraySplit
from job.errors import DataError, InputNotFound
from support.datasets import write_flat, write_idx


def save(path: Path, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8)).save(path)
    return path


@pytest.mark.parametrize("place", ["food", "data2/food-11", "kaggle 13/ünï/07", "3_4/training"])
def test_food11_labels_come_from_the_files_own_name(tmp_path: Path, place: str) -> None:
    root = tmp_path / place
    for name in ("training/3_45.jpg", "training/0_7.jpg", "validation/10_1.jpg"):
        save(root / name)
    save(root / "testing" / "0007.jpg")
    data = open_data(str(root))
    assert data.layout == "Food-11 files"
    assert data.class_names == tuple(str(n) for n in range(11))
    training = data.splits["training"]
    assert [training.name(i) for i in range(2)] == ["training/0_7.jpg", "training/3_45.jpg"]
    assert training.labels.tolist() == [0, 3]
    assert data.splits["validation"].labels.tolist() == [10]
    assert data.splits["testing"].labels.tolist() == [UNLABELLED]
    with pytest.raises(DataError, match="predict"):
        data.labelled("testing")


def test_a_labelled_evaluation_folder_stands_in_for_testing(tmp_path: Path) -> None:
    save(tmp_path / "training" / "1_0.jpg")
    save(tmp_path / "evaluation" / "1_0.jpg")
    assert open_data(str(tmp_path)).labelled("testing").labels.tolist() == [1]


def test_unpadded_test_files_come_in_number_order(tmp_path: Path) -> None:
    for number in (10, 2, 0, 1):
        save(tmp_path / "testing" / f"{number}.jpg")
    split = open_data(str(tmp_path)).split("testing")
    assert [split.name(i) for i in range(4)] == [f"testing/{n}.jpg" for n in (0, 1, 2, 10)]
    assert natural_key("2.jpg") < natural_key("10.jpg") < natural_key("a.jpg")


def test_class_folders_in_any_spelling_and_case(tmp_path: Path) -> None:
    for path in ("train/cat/a.JPG", "train/dog/b.PnG", "train/dog/deep/c.webp", "val/dog/d.BMP",
                 "Test/cat/e.jpeg"):  # fmt: skip
        save(tmp_path / path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / "._a.jpg").write_text("resource fork of another system")
    (tmp_path / "train" / "empty").mkdir()
    data = open_data(str(tmp_path))
    assert data.layout == "class folders"
    assert data.class_names == ("cat", "dog")
    assert data.splits["training"].labels.tolist() == [0, 1, 1]
    assert data.splits["validation"].labels.tolist() == [1]
    assert data.splits["testing"].labels.tolist() == [0]


def test_hidden_folders_and_circles_of_links_add_no_images(tmp_path: Path) -> None:
    for path in ("train/a/0.png", "train/b/0.png", "train/a/.thumbnails/0.png"):
        save(tmp_path / path)
    (tmp_path / "train" / "a" / "up").symlink_to("..")
    (tmp_path / "train" / "a" / "same").symlink_to(".")
    save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "train" / "b" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "val").mkdir()
    assert open_data(str(tmp_path)).splits["training"].labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "labels", [np.zeros((3, 2, 2)), np.zeros(()), np.zeros((3, 0)), [0, 1, 255]]
)
def test_idx_labels_that_are_none_are_refused(tmp_path: Path, labels: object) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 28, 28)))
    path = tmp_path / "train-labels-idx1-ubyte"
    if isinstance(labels, list):
        path.write_bytes(b"\0\0\x09\1\0\0\0\3" + bytes(labels))  # signed: the last is -1
    else:
        write_idx(path, labels)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not labels"):
        open_data(str(tmp_path))


def test_a_class_that_training_lacks_is_named(tmp_path: Path) -> None:
    save(tmp_path / "train" / "cat" / "a.jpg")
    save(tmp_path / "val" / "cow" / "a.jpg")
    with pytest.raises(DataError, match="cow"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_of_the_mnist_family(tmp_path: Path, ending: str) -> None:
    images = np.arange(6 * 28 * 28).reshape(6, 28, 28) % 256
    for split, count in (("train", 6), ("t10k", 2)):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{ending}", images[:count])
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{ending}", np.arange(count))
    data = open_data(str(tmp_path))
    assert data.layout == "IDX files"
    assert {name: len(split) for name, split in data.splits.items()} == {
        "training": 6,
        "testing": 2,
    }
    assert len(data.class_names) == 6
    training = data.splits["training"]
    assert isinstance(training, ArraySplit)
    assert (training.images == images).all()


def test_idx_files_may_have_a_prefix_and_a_folder_of_their_own(tmp_path: Path) -> None:
    inner = tmp_path / "gzip"
    inner.mkdir()
    write_idx(inner / "emnist-mnist-train-images-idx3-ubyte.gz", np.zeros((3, 28, 28)))
    write_idx(inner / "emnist-mnist-train-labels-idx1-ubyte.gz", np.arange(3))
    assert len(open_data(str(tmp_path)).splits["training"]) == 3
    write_idx(inner / "emnist-letters-train-images-idx3-ubyte.gz", np.zeros((3, 28, 28)))
    with pytest.raises(DataError, match="2 sets"):
        open_data(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-5], "needs"),
        (lambda c: b"\1" + c[1:], "not an IDX file"),
        (lambda c: c[:6], "truncated"),
        (lambda c: b"", "not an IDX file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, np.zeros((3, 28, 28)))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        open_data(str(tmp_path))
    assert path.name in str(caught.value)


def test_no_validation_split_holds_out_a_stratified_tenth_and_says_so(tmp_path: Path) -> None:
    write_flat(tmp_path, {"training": 20}, classes=3)
    save(tmp_path / "training" / "3_0.jpg")  # a class of one image gives none away
    whole = open_data(str(tmp_path))
    data = hold_out_validation(whole, seed=0)
    assert any("stratified tenth" in note for note in data.notes)
    assert np.bincount(data.splits["validation"].labels).tolist() == [2, 2, 2]
    assert np.bincount(data.splits["training"].labels).tolist() == [18, 18, 18, 1]
    names = [
        {split.name(i) for i in range(len(split))}
        for split in (data.splits["training"], data.splits["validation"])
    ]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == len(whole.splits["training"])
    again = hold_out_validation(whole, seed=0).splits["validation"]
    other = hold_out_validation(whole, seed=1).splits["validation"]
    assert again.digest() == data.splits["validation"].digest() != other.digest()


def test_an_entry_in_the_table_adds_a_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_npz(path: Path) -> Dataset:
        content = np.load(path)
        split = ArraySplit(content["images"], content["labels"])
        return Dataset(path.name, ("cat", "dog"), {"training": split})

    def open_npz_folder(root: Path, _lister: Lister) -> Dataset | None:
        files = sorted(root.glob("*.npz"))
        return open_npz(files[0]) if files else None

    layout = Layout("NumPy archives (train.npz)", open_npz_folder, open_npz, suffix=".npz")
    monkeypatch.setitem(LAYOUTS, "NumPy", layout)
    file = tmp_path / "train.npz"
    with pytest.raises(DataError, match=r"NumPy archives \(train\.npz\)"):
        open_data(str(tmp_path))
    np.savez(file, images=np.zeros((2, 8, 8), np.uint8), labels=np.array([1, 0]))
    for path in (tmp_path, file):
        data = open_data(str(path))
        assert data.layout == "NumPy"
        assert data.labelled("training").labels.tolist() == [1, 0]


def test_what_was_looked_for_is_shown(tmp_path: Path) -> None:
    (tmp_path / "stuff").mkdir()
    (tmp_path / "other").mkdir()
    save(tmp_path / "stuff" / "x.jpg")
    with pytest.raises(DataError, match="is not a data set; looked for") as caught:
        open_data(str(tmp_path))
    assert all(layout.help in str(caught.value) for layout in LAYOUTS.values())
    with pytest.raises(InputNotFound, match="does not exist"):
        open_data(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="is a file"):
        open_data(str(save(tmp_path / "a.png")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("training/3_4.jpg", "training/cat_1.jpg"), "'cat'"),
        (("training/3_4.jpg", "training/0005.jpg"), r"0005\.jpg has no class"),
        (("training/20240131_4.jpg", "training/0_1.jpg"), "20,240,131"),
        (("training/0_4.jpg", "evaluation/7_1.jpg"), "of class 7"),
        (("training/0_4.jpg", "train/0_4.jpg"), "two training folders"),
    ],
)
def test_names_that_make_no_sense_are_refused(
    tmp_path: Path, files: tuple[str, ...], message: str
) -> None:
    for name in files:
        save(tmp_path / name)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path))


def test_flat_files_may_have_class_names_in_place_of_numbers(tmp_path: Path) -> None:
    for name in ("training/bread_1.jpg", "training/egg_2.jpg", "validation/egg_1.jpg"):
        save(tmp_path / name)
    data = open_data(str(tmp_path))
    assert data.class_names == ("bread", "egg")
    assert data.splits["validation"].labels.tolist() == [1]


def test_a_name_that_is_not_utf8_is_read_and_can_be_printed(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(os.fsencode(folder) + b"/1_\xff\xfe.png")
    split = open_data(str(tmp_path)).splits["training"]
    assert split.image(0).size == (8, 8)
    assert len(split.digest()) == 32


def test_a_split_that_is_missing_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    save(tmp_path / "testing" / "7.jpg")
    data = open_data(str(tmp_path))
    with pytest.raises(InputNotFound, match=r"no training split; it has: testing$"):
        data.labelled("training")  # as prune does it, which has no --split
    with pytest.raises(InputNotFound, match=r"no validation split; --split can be testing$"):
        data.labelled("validation")


def test_folders_of_images_and_masks_hint_at_segmentation(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        save(tmp_path / "train" / kind / "1.png")
    assert any("--task segmentation" in note for note in open_data(str(tmp_path)).notes)
    save(tmp_path / "train" / "cat" / "1.png")
    (tmp_path / "train" / "masks" / "1.png").unlink()
    (tmp_path / "train" / "masks").rmdir()
    assert not any("--task" in note for note in open_data(str(tmp_path)).notes)
