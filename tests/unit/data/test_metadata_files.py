"""Image folders with metadata.csv or metadata.jsonl, as Hugging Face's ``imagefolder`` has them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from job.data.dataset import Dataset
from job.data.layout import open_data
from job.data.splits import UNLABELLED
from job.errors import DataError

LABELS = ("dog", "cat", "dog")


def put(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        image = folder / str(row["file_name"])
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")


def labelled(*names: str) -> list[dict[str, object]]:
    return [
        {"text": "a photo", "file_name": name, "label": label}
        for name, label in zip(names, LABELS, strict=False)
    ]


def classes(data: Dataset, split: str) -> dict[str, str]:
    images = data.splits[split]
    return {
        images.name(i): data.class_names[images.labels[i]] if images.labels[i] >= 0 else ""
        for i in range(len(images))
    }


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("zipped", [False, True])
def test_each_split_folder_has_a_file(tmp_path: Path, name: str, zipped: bool) -> None:
    root = tmp_path / "data"
    put(root / "train", name, labelled("0.png", "1.png", "in/2.png"))
    put(root / "dev", name, labelled("0.png", "1.png"))
    (root / "test").mkdir()
    (root / "test" / "7.png").touch()
    path = root
    if zipped:
        path = tmp_path / "data.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in root.rglob("*"):
                archive.write(file, file.relative_to(root))
    data = open_data(str(path))
    assert data.layout == "metadata files"
    assert data.class_names == ("cat", "dog")
    assert classes(data, "training") == {
        "train/0.png": "dog", "train/1.png": "cat", "train/in/2.png": "dog",
    }  # fmt: skip
    assert classes(data, "validation") == {"dev/0.png": "dog", "dev/1.png": "cat"}
    assert classes(data, "testing") == {"test/7.png": ""}
    assert data.splits["testing"].labels.tolist() == [UNLABELLED]
    assert data.notes == ()


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_one_file_names_images_of_all_splits(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, labelled("train/0.png", "train/1.png", "val/0.png"))
    data = open_data(str(tmp_path))
    assert {split: len(images) for split, images in data.splits.items()} == {
        "training": 2, "validation": 1,
    }  # fmt: skip
    assert classes(data, "validation") == {"val/0.png": "dog"}
    if name.endswith("jsonl"):
        assert open_data(str(tmp_path / name)).class_names == ("cat", "dog")


def test_a_column_split_decides_before_the_folder(tmp_path: Path) -> None:
    rows = labelled("train/0.png", "train/1.png", "train/2.png")
    put(tmp_path, "metadata.jsonl", [row | {"split": "train"} for row in rows[:2]])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(rows[2] | {"split": "validation"}) + "\n")
    assert classes(open_data(str(tmp_path)), "validation") == {"train/2.png": "dog"}


def test_class_numbers_are_classes_in_numeric_order(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"file_name": f"{label}.png", "label": label} for label in (10, 2, 0)
    ]
    put(tmp_path, "metadata.jsonl", rows)
    assert open_data(str(tmp_path)).class_names == ("0", "2", "10")


def test_files_of_captions_leave_class_folders_as_they_are(tmp_path: Path) -> None:
    for split in ("train", "val"):
        rows: list[dict[str, object]] = [
            {"file_name": f"{label}/{n}.png", "text": "a photo"}
            for label in ("cat", "dog")
            for n in range(2)
        ]
        put(tmp_path / split, "metadata.csv", rows)
    data = open_data(str(tmp_path))
    assert data.layout == "class folders"
    assert data.class_names == ("cat", "dog")


def test_a_run_of_an_earlier_version_keeps_its_layout(tmp_path: Path) -> None:
    rows = [row | {"file_name": f"{row['label']}/{row['file_name']}"} for row in labelled("0.png")]
    put(tmp_path / "train", "metadata.csv", [rows[0], rows[0] | {"file_name": "x/1.png"}])
    assert open_data(str(tmp_path)).class_names == ("dog",)
    assert open_data(str(tmp_path), listing=2).class_names == ("dog", "x")


def test_images_that_the_file_does_not_name_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "train", "metadata.csv", labelled("0.png", "1.png"))
    for name in ("8.png", "9.png"):
        (tmp_path / "train" / name).touch()
    notes = open_data(str(tmp_path)).notes
    assert len(notes) == 1
    assert "left out: 2 images not in" in notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "0.png"', "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"label": 1}', "line 2 has no path"),
        ('{"file_name": "0.png", "label": [1, 2]}', r"its label is \[1, 2\], not one name"),
        ('{"file_name": "0.png", "label": null}', "line 2 has no label"),
        ('{"file_name": "0.png", "label": 1, "split": "half"}', "the unknown split 'half'"),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "label": 0}\n' + line)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path))


def test_training_images_without_a_file_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "train", "metadata.csv", labelled("0.png", "1.png"))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0.png").touch()
    with pytest.raises(DataError, match=r"val has no metadata\.csv or metadata\.jsonl"):
        open_data(str(tmp_path))
