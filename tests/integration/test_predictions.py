"""What people point evaluate and predict at: any images, the run's own data, other layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.artifacts.json_records import to_json
from job.artifacts.model_card import read_card
from job.config import PruneConfig
from job.data.dataset import hold_out_validation
from job.data.layout import open_data
from job.files import toml_text
from job.pipeline.training_data import dataset_record, prepare_data
from support.brightness import MODEL, NAMES, call, predict, put, write_run


def test_the_folder_7_is_class_7_whatever_its_place(run: Path) -> None:
    rows = predict(run)  # the run's own data, whose testing files are numbers
    assert [(int(row["Id"]), row["Category"]) for row in rows] == [(n, str(n)) for n in range(12)]
    rows = predict(run, "--format", "csv")
    assert [(r["file"], r["class"]) for r in rows] == [(f"test/{n}.png", str(n)) for n in range(12)]
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows)


def test_the_order_of_number_folders_is_said_once(data: Path, run: Path) -> None:
    notes = [note for note in open_data(str(data)).notes if "ordered as text" in note]
    assert len(notes) == 1
    assert "class 2 of the network is folder 10" in notes[0]
    assert read_card(run / "rounds" / "00").class_names == NAMES


@pytest.mark.parametrize("split", ["test", "testing", "TEST"])
def test_splits_go_by_several_names(run: Path, split: str) -> None:
    assert len(predict(run, "--split", split)) == 12
    record = json.loads(call("evaluate", run, "--json", "--split", "train", "--workers", 0).output)
    assert (record["split"], record["count"], record["accuracy"]) == ("training", 24, 1.0)
    dev = json.loads(call("evaluate", run, "--json", "--split", "dev", "--workers", 0).output)
    assert (dev["split"], dev["count"]) == ("validation", 24)


def test_any_folder_of_images_nested_or_one_image(run: Path, tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", "b/c/1.JPG", "b/2.gif", level=7)
    put(photos, "a.tiff", level=3)
    (photos / "notes.txt").write_text("x")
    rows = predict(run, "--data", photos)
    assert [(r["file"], r["class"]) for r in rows] == [
        ("a.tiff", "3"), ("b/2.gif", "7"), ("b/c/1.JPG", "7"),
    ]  # fmt: skip
    assert [(r["file"], r["class"]) for r in predict(run, "--data", photos / "a.tiff")] == [
        ("a.tiff", "3")
    ]
    numbers = put(tmp_path / "numbers", "1.png", "2.png", level=10)
    assert [row["class"] for row in predict(run, "--data", numbers)] == ["10", "10"]
    assert [row["Id"] for row in predict(run, "--data", numbers, "--format", "kaggle")] == [
        "1",
        "2",
    ]
    done = call("predict", run, "--workers", 0, "--output", "p.csv", "--data", photos)
    assert "1 .txt" in done.output
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.heic").touch()
    none = call("predict", run, "--output", "p.csv", "--data", tmp_path / "none")
    assert none.exit_code == 65
    assert "holds no images" in none.output
    assert ".heic" in none.output


def test_class_folders_without_splits_are_held_out_from_or_used_whole(
    tmp_path: Path, run: Path
) -> None:
    root = tmp_path / "plain"
    for number in range(12):
        put(root, *(f"{number}/{i}.png" for i in range(10)), level=number)
    assert open_data(str(root)).layout == "class folders without splits"
    assert len(predict(run, "--data", root)) == 120
    other = json.loads(call("evaluate", run, "--data", root, "--json", "--workers", 0).output)
    assert (other["count"], other["accuracy"]) == (120, 1.0)
    own = write_run(tmp_path / "own", str(root), seed=5)
    held_out = json.loads(call("evaluate", own, "--json", "--workers", 0).output)
    assert (held_out["split"], held_out["count"]) == ("validation", 12)
    missing = call("evaluate", own, "--split", "test", "--workers", 0)
    assert missing.exit_code == 66
    assert "no testing split" in missing.output


def test_own_data_are_found_from_a_round_a_copy_and_elsewhere_or_asked_for(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "rounds" / "00", tmp_path / "models" / "a" / "copy")
    monkeypatch.chdir("/")
    for model in (run, run / "rounds" / "00", tmp_path / "models" / "a" / "copy"):
        done = call("evaluate", model, "--json", "--workers", 0)
        assert json.loads(done.output)["count"] == 24, done.output
    data.rename(tmp_path / "moved")
    for command in (("evaluate", run), ("predict", run, "--output", tmp_path / "p.csv")):
        done = call(*command)
        assert done.exit_code == 66
        assert "pass --data" in done.output
        assert str(data) in done.output
    (run / "config.toml").unlink()
    done = call("evaluate", run)
    assert done.exit_code == 2
    assert "does not say which data" in done.output
    weights = run / "rounds" / "00" / "model.safetensors"
    alone = call("evaluate", weights, "--model", MODEL)
    assert alone.exit_code == 2
    assert "pass --data" in alone.output


def test_the_built_in_data_of_a_run_are_its_own(run: Path, tmp_path: Path) -> None:
    own = write_run(tmp_path / "fashion", None)
    done = call("evaluate", own, "--split", "test", "--json", "--workers", 0)
    assert json.loads(done.output)["count"] == 1000
    mistaken = call("evaluate", run, "--data", "built-in", "--workers", 0)
    assert mistaken.exit_code == 65
    assert "T-shirt" in mistaken.output


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_of_paths_and_labels_is_a_data_set(run: Path, tmp_path: Path, delimiter: str) -> None:
    for number in range(12):
        put(tmp_path / "x", f"images/{number}.png", level=number)
    far = put(tmp_path / "far away", "a.png", level=11) / "a.png"
    lines = [("Filename", "extra", "Class", "Split")]
    lines += [(f"images/{n}.png", "", str(n), s) for n in range(12) for s in ("train", "dev")]
    lines += [(str(far), "", "", "test")]
    path = tmp_path / "x" / "all.csv"
    text = "\n".join(delimiter.join(line) for line in lines)
    path.write_text("\ufeff" + text + "\n\n")
    for given in (path, tmp_path / "x"):
        data = open_data(str(given))
        assert (data.layout, data.class_names) == ("CSV", tuple(map(str, range(12))))
        assert {name: len(split) for name, split in data.splits.items()} == {
            "training": 12, "validation": 12, "testing": 1,
        }  # fmt: skip
        record = json.loads(call("evaluate", run, "--data", given, "--json", "--workers", 0).output)
        assert record["data"] == str(given)  # not the folder that a file is in
        assert (record["count"], record["accuracy"]) == (12, 1.0)  # in the model's own order
        assert [row["class"] for row in predict(run, "--data", given)] == ["11"]


def test_csv_files_may_be_one_a_split(tmp_path: Path) -> None:
    for split, rows in (("train", "cat dog cat"), ("val", "dog"), ("test", "")):
        lines = [f"{n}.png,{label}" for n, label in enumerate(rows.split())] or ["7.png,"]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label", *lines]))
    data = open_data(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.splits["training"].labels.tolist() == [0, 1, 0]
    assert data.splits["validation"].labels.tolist() == [1]
    assert data.splits["testing"].labels.tolist() == [-1]


def test_the_order_of_a_csvs_classes_is_no_accident(tmp_path: Path) -> None:
    labels = [f"{0:0{width}}" for width in range(1, 12)]  # all are 0, in other words
    rows = [f"a.png,{label}" for label in reversed(labels)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *rows]))
    assert open_data(str(tmp_path / "all.csv")).class_names == tuple(labels)
    (tmp_path / "all.csv").write_text(f"path,label\na.png,{'3' * 5000}\nb.png,2")  # int() refuses
    assert open_data(str(tmp_path / "all.csv")).class_names == ("2", "3" * 5000)


def test_csv_rows_end_at_line_ends_alone(tmp_path: Path) -> None:
    names = ("a\u2028b.png", "c\x85d.png", "e\x0bf.png", "g\x1ch.png")
    text = "path,label\r\n" + "".join(f"{name},1\r\n" for name in names) + '"x\ny.png",2\r\n'
    (tmp_path / "all.csv").write_bytes(text.encode())
    split = open_data(str(tmp_path / "all.csv")).splits["training"]
    assert [split.name(n) for n in range(len(split))] == [*names, "x\ny.png"]
    (tmp_path / "old.csv").write_text("path,label\ra.png,1\rb.png,2\r")
    assert len(open_data(str(tmp_path / "old.csv")).splits["training"]) == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            "a.png,1,train b.png,2,train a.png,1,val",
            "1 training image also in the validation spl",
        ),
        ("a.png,1,train b.png,2,train ./a.png,1,train", "1 training image with several rows (a.p"),
        ("a.png,1,train a.png,1,train b.png,1,val", ""),  # a class is given more weight
        ("a.png,1,train b.png,1,test b.png,1,val", ""),
    ],
)
def test_images_that_are_trained_on_and_validated_on_are_warned_of(
    tmp_path: Path, rows: str, said: str
) -> None:
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *rows.split()]))
    notes = open_data(str(tmp_path / "all.csv")).notes
    assert said in "".join(notes)
    assert len(notes) == bool(said)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("path,label\na.png,cat\n,dog\nb.png,\n", 65, "line 3 has no path, line 4 has no label"),
        ("path,label,split\na.png,cat,tarin\n", 65, "line 2 has the unknown split 'tarin'"),
        ("path,label,split\na.png,cat,train\nb.png,cow,val\n", 65, "line 3 has the class 'cow'"),
        ("name,label\na.png,cat\n", 65, "no column of image paths"),
        ("path,label\n", 65, "names no images"),
        pytest.param("x" * 200_000 + ",label\n", 65, "no column of image paths", id="long"),
        ("path,label\na.png,cat\nb.png,dog\n", 65, "a.png cannot be read as an image: it does not"),
    ],
)
def test_bad_rows_of_a_csv_are_named(
    run: Path, tmp_path: Path, text: str, code: int, said: str
) -> None:
    (tmp_path / "bad.csv").write_text(text)
    more = ("--split", "training", "--workers", 0)
    done = call("evaluate", run, "--data", tmp_path / "bad.csv", *more)
    assert done.exit_code == code, done.output
    assert said in done.output


def test_what_is_left_out_is_counted_in_one_line(tmp_path: Path) -> None:
    put(tmp_path, *(f"train/{c}/{n}.png" for c in "abc" for n in range(3)))
    put(tmp_path, "val/a/0.png", "val/b/0.png", "train/a/1.JFIF.jpg")
    for name in ("train/a/x.heic", "train/a/y.heic", "val/b/notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "train" / "bird").mkdir()
    notes = open_data(str(tmp_path)).notes
    assert len(notes) == 1
    assert "3 files that are not images by name (2 .heic, 1 .txt)" in notes[0]
    assert "1 folder without images" in notes[0]
    assert "bird" in notes[0]


@pytest.mark.parametrize("suffix", ["jfif", "GIF", "tif", "TIFF", "avif", "jpe", "mpo"])
def test_other_suffixes_are_images(tmp_path: Path, suffix: str) -> None:
    for name in ("train/a/0.png", "train/b/0.png"):
        put(tmp_path, name)
    image = tmp_path / "train" / "c" / f"0.{suffix}"
    image.parent.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")
    image.write_bytes((tmp_path / "x.png").read_bytes())
    data = open_data(str(tmp_path))
    assert data.class_names == ("a", "b", "c")
    assert data.notes == ()
    old = open_data(str(tmp_path), listing=1)
    assert old.class_names == ("a", "b")
    assert "c" in old.notes[0]


def test_a_run_of_before_is_resumed_on_the_files_that_it_was_begun_with(tmp_path: Path) -> None:
    root = tmp_path / "data"
    put(root, *(f"train/{label}/{n}.png" for label in "ab" for n in range(20)))
    old = to_json(dataset_record(hold_out_validation(open_data(str(root)), 0)))
    put(root, "train/a/20.gif", "dev/a/0.png", "dev/b/0.png")
    config = PruneConfig(data=str(root))
    text = toml_text({"prune": config.to_dict(), "dataset": {**old, "listing": 2}})
    (tmp_path / "run").mkdir()
    for listing in ("listing = 2\n", ""):
        content = text.replace("listing = 2\n", listing)
        (tmp_path / "run" / "config.toml").write_text(content)
        data, _ = prepare_data(config, output=tmp_path / "run")
        assert (dataset_record(data).fingerprint == old["fingerprint"]) == (listing == "")
    data, _ = prepare_data(config, output=tmp_path / "new")
    assert {name: len(split) for name, split in data.splits.items()} == {
        "training": 41, "validation": 2,
    }  # fmt: skip


def test_a_class_without_validation_images_is_named(tmp_path: Path) -> None:
    put(tmp_path, "train/a/0.png", "train/b/0.jfif.png", "train/bird/0.png", "val/a/1.png")
    data, _ = prepare_data(PruneConfig(data=str(tmp_path)))
    assert any("no validation images of 2 classes (b, bird)" in note for note in data.notes)
