"""Data sets in zip and tar files and in WebDataset shards; hostile archives are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.data import archive as archive_module
from job.data import unpacked_tar as unpacked_module
from job.data.archive import open_archive
from job.data.cache.image_set import ImageSet
from job.data.image_check import check_images
from job.data.layout import open_data, open_unlabelled
from job.data.splits import ArraySplit
from job.errors import DataError, InputNotFound, StorageError
from support.datasets import write_flat, write_idx, write_noise_idx


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    return folder


def pack(folder: Path, kind: str) -> Path:
    """The archive of a folder, under its name."""
    made = shutil.make_archive(str(folder), kind, folder.parent, folder.name)
    return Path(made)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
@pytest.mark.parametrize("layout", ["Food-11 files", "class folders"])
def test_an_archive_is_the_data_set_that_it_holds(tmp_path: Path, kind: str, layout: str) -> None:
    root = write_flat(tmp_path / "food-11", {"training": 4, "validation": 2})
    if layout == "class folders":
        for file in list(root.glob("*/*.png")):
            place = file.parent / f"class{file.name[0]}" / file.name
            place.parent.mkdir(exist_ok=True)
            file.rename(place)
    (root / "training" / "notes.txt").write_text("no image")
    unpacked, packed = open_data(str(root)), open_data(str(pack(root, kind)))
    assert packed.layout == unpacked.layout == layout
    assert packed.class_names == unpacked.class_names
    splits = ("training", "validation")
    assert packed.fingerprint(splits) == unpacked.fingerprint(splits)
    assert packed.notes == unpacked.notes
    ours, theirs = packed.splits["training"], unpacked.splits["training"]
    ours = pickle.loads(pickle.dumps(ours))  # as loader processes receive it
    for index in range(len(theirs)):
        assert ours.name(index) == theirs.name(index)
        assert np.array_equal(np.asarray(ours.image(index)), np.asarray(theirs.image(index)))
    checked, largest = check_images(packed, splits, "fail")
    assert largest == 42
    images = ImageSet.of(checked, splits)
    assert images
    assert images.with_key().key


def test_a_compressed_tar_is_unpacked_once_into_scratch(tmp_path: Path, scratch: Path) -> None:
    archive = pack(write_flat(tmp_path / "food-11", {"training": 2}), "gztar")
    open_data(str(archive))
    (unpacked,) = scratch.glob("*/*.tar")
    times = unpacked.stat().st_mtime_ns
    unpacked_module._unpacked.clear()
    open_data(str(archive))
    assert unpacked.stat().st_mtime_ns == times
    assert not list(scratch.glob("*/.*.tmp"))


def test_other_layouts_in_an_archive(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "listed", {"pixels": 2})
    (root / "train.csv").write_text("file,label\npixels/0_0.png,cat\npixels/1_1.png,dog\n")
    data = open_data(str(pack(root, "zip")))
    assert (data.layout, data.class_names) == ("CSV", ("cat", "dog"))
    assert data.splits["training"].image(1).size == (40, 41)
    idx = open_data(str(pack(write_noise_idx(tmp_path / "idx", 8, 4), "tar")))
    assert isinstance(idx.splits["training"], ArraySplit)
    write_idx(tmp_path / "idx" / "test-images-idx3-ubyte.gz", np.zeros((2, 4, 4)))
    assert len(open_data(str(pack(tmp_path / "idx", "zip"))).splits["testing"]) == 2
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.new("RGB", (5, 4)).save(loose / "a.png")
    images = open_unlabelled(pack(loose, "zip"))
    assert images.splits["testing"].image(0).size == (5, 4)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes, **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(content))


def write_shard(path: Path, first: int, label: Callable[[int], tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + 3):
            add(archive, f"{number:04}.png", png(number))
            extension, content = label(number)
            add(archive, f"{number:04}.{extension}", content)


LABELS: dict[str, Callable[[int], tuple[str, bytes]]] = {
    "numbers": lambda n: ("cls", b"%d\n" % (n % 3)),
    "names": lambda n: ("cls", f"class {n % 3}".encode()),
    "json": lambda n: ("json", json.dumps({"label": n % 3, "width": 6}).encode()),
}


@pytest.mark.parametrize("label", LABELS)
def test_webdataset_shards(tmp_path: Path, label: str) -> None:
    for number in range(3):
        write_shard(tmp_path / f"train-{number:03}.tar", 3 * number, LABELS[label])
    write_shard(tmp_path / "val-000.tar", 9, LABELS[label])
    named = tuple("012") if label != "names" else ("class 0", "class 1", "class 2")
    pattern = open_data(str(tmp_path / "train-{000..002}.tar"))
    folder = open_data(str(tmp_path))
    both = open_data(str(tmp_path / "{train,val}-{000..000}.tar"))
    single = open_data(str(tmp_path / "train-001.tar"))
    for data, training, validation in (
        (pattern, 9, 0), (folder, 9, 3), (both, 3, 3), (single, 3, 0),
    ):  # fmt: skip
        assert data.layout == "WebDataset shards"
        assert data.class_names == named
        assert len(data.splits["training"]) == training
        assert len(data.splits.get("validation", ())) == validation
    split = pickle.loads(pickle.dumps(folder.splits["training"]))
    for index in range(9):
        assert np.asarray(split.image(index))[0, 0, 0] == index
        assert split.labels[index] == index % 3


def test_shards_that_are_missing_or_have_no_label(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", 0, LABELS["numbers"])
    with pytest.raises(InputNotFound, match=r"train-1\.tar does not exist \(2 of 3 are missing\)"):
        open_data(str(tmp_path / "train-{0..2}.tar"))
    with pytest.raises(DataError, match="names 0 shards"):
        open_data(str(tmp_path / "train-{2..0}.tar"))
    with pytest.raises(DataError, match="more than 100,000 shards"):
        open_data(str(tmp_path / "train-{0..99999999999}.tar"))
    write_shard(tmp_path / "train-1.tar", 3, lambda _: ("txt", b"a caption"))
    with pytest.raises(DataError, match=r"0003\.png has no \.cls or \.json"):
        open_data(str(tmp_path / "train-{0..1}.tar"))
    write_shard(tmp_path / "train-1.tar", 3, lambda _: ("json", b"[[[["))
    with pytest.raises(DataError, match=r"0003\.json is not a label"):
        open_data(str(tmp_path / "train-{0..1}.tar"))


# --- hostile archives


def hostile_tar(path: Path, case: str) -> None:
    with tarfile.open(path, "w") as archive:
        add(archive, "training/0_0.png", png(0))
        if case == "traversal":
            add(archive, "training/../../etc/0_1.png", png(1))
        elif case == "absolute":
            add(archive, "/etc/0_1.png", png(1))
        elif case == "symlink":
            add(archive, "training/0_1.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        elif case == "hard link":
            add(archive, "training/0_1.png", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")
        elif case == "device":
            add(archive, "training/0_1.png", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        elif case == "pipe":
            add(archive, "training/0_1.png", b"", type=tarfile.FIFOTYPE)
        elif case == "twice":
            add(archive, "./training//0_0.png", png(1))
        elif case == "file and folder":
            add(archive, "training/0_0.png/0_1.png", png(1))
        else:
            add(archive, "training/0_1.png", png(1))
            add(archive, "training/0_2.png", png(2))
    content = path.read_bytes()
    if case == "cut short":
        path.write_bytes(content[: 512 * 3 + 100])
    elif case == "no end":
        path.write_bytes(content[: 512 * 4])
    elif case == "damaged header":
        path.write_bytes(content[: 512 * 2] + b"\xff" * 512 + content[512 * 3 :])


TARS = {
    "traversal": "leads outside the archive", "absolute": "leads outside the archive",
    "symlink": "a link to /etc/passwd", "hard link": "a link to /etc/passwd",
    "device": "neither a file nor a folder", "pipe": "neither a file nor a folder",
    "twice": "two files named training/0_0.png", "cut short": "unexpected end of data",
    "file and folder": "a file and a folder named training/0_0.png",
    "no end": "truncated or damaged", "damaged header": "truncated or damaged",
}  # fmt: skip


@pytest.mark.parametrize("case", TARS)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_hostile_tar_is_refused(tmp_path: Path, case: str, compressed: bool) -> None:
    path = tmp_path / "data.tar"
    hostile_tar(path, case)
    if compressed:
        path = tmp_path / "data.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "data.tar").read_bytes()))
    with pytest.raises(DataError, match=TARS[case]) as caught:
        open_data(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def hostile_zip(path: Path, case: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("training/0_0.png", png(0))
        if case == "traversal":
            archive.writestr("../0_1.png", png(1))
        elif case == "link":
            info = zipfile.ZipInfo("training/0_1.png")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
        elif case == "bomb":
            archive.writestr("training/0_1.png", bytes(65 << 20))
        elif case == "method":
            archive.writestr("training/0_1.png", png(1), zipfile.ZIP_LZMA)
        else:
            archive.writestr("training/0_1.png", png(1))
    content = bytearray(path.read_bytes())
    directory = content.rfind(b"PK\1\2")  # of the last file
    if case == "encrypted":
        content[directory + 8] |= 1
    elif case == "overlap":
        content[directory + 42 : directory + 46] = bytes(4)  # where the first file is
    elif case == "grown":
        content[directory + 20 : directory + 24] = (1 << 20).to_bytes(4, "little")
    elif case == "cut short":
        del content[len(content) // 2 :]
    elif case == "damaged":
        content[60] ^= 0xFF
    path.write_bytes(content)


ZIPS = {
    "traversal": "leads outside the archive", "link": "is a link", "bomb": "68,157,440 bytes",
    "method": "unsupported method", "encrypted": "is encrypted", "overlap": "files overlap",
    "grown": "files overlap", "cut short": "cannot be read as an archive",
}  # fmt: skip


@pytest.mark.parametrize("case", ZIPS)
def test_a_hostile_zip_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "data.zip"
    hostile_zip(path, case)
    with pytest.raises(DataError, match=ZIPS[case]):
        open_data(str(path))


def test_damage_within_an_image_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    hostile_zip(path, "damaged")
    data = open_data(str(path))
    with pytest.raises(DataError, match=r"data\.zip/training/0_0\.png is damaged in the archive"):
        check_images(data, ["training"], "fail")
    data, _ = check_images(data, ["training"], "skip")
    assert len(data.splits["training"]) == 1
    assert data.skipped == ("training/0_0.png",)


def test_a_compressed_tar_that_unpacks_without_end_is_refused(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.tar.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(80):
            file.write(bytes(1 << 20))
    with pytest.raises(DataError, match="unpacks to more than 67,108,864 bytes"):
        open_data(str(path))
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(unpacked_module, "UNCHECKED_SIZE", 1 << 30)
    with pytest.raises(DataError, match="cannot be unpacked"):
        open_data(str(path))
    usage = shutil.disk_usage(scratch)
    monkeypatch.setattr(
        unpacked_module.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20)
    )
    with pytest.raises(StorageError, match="set TMPDIR to a larger one"):
        open_data(str(path))
    assert [file.suffix for file in scratch.glob("*/*")] == [".lock"] * 2


def test_threads_that_open_an_archive_at_once_read_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            archive.writestr(str(number), bytes([number]) * 100)
    indexed = open_archive(path).archive
    opening, plain = threading.Barrier(4, timeout=20), archive_module._plain

    def slow(path: Path) -> Path:
        opening.wait()  # all have seen that it is not open
        time.sleep(0.002 * next(order))
        return plain(path)

    def late(*args: int) -> bytes:
        time.sleep(0.02)  # the others have opened it too
        return pread(*args)

    pread = os.pread
    monkeypatch.setattr(os, "pread", late)
    monkeypatch.setattr(archive_module, "_plain", slow)
    for _ in range(5):
        opened, order = pickle.loads(pickle.dumps(indexed)), iter(range(4))
        with ThreadPoolExecutor(4) as pool:
            contents = list(pool.map(opened.read, "0123"))
        assert contents == [bytes([number]) * 100 for number in range(4)]


def test_members_are_read_in_place(tmp_path: Path) -> None:
    archive = pack(write_flat(tmp_path / "food-11", {"training": 2}), "zip")
    root = open_archive(archive)
    file = root / "food-11" / "training" / "0_0.png"
    assert (file.is_file(), file.is_dir(), file.parent.is_dir()) == (True, False, True)
    assert not (root / "../../etc/passwd").exists()
    assert os.fspath(file) == f"{archive}/food-11/training/0_0.png"
    with pytest.raises(FileNotFoundError):
        (root / "none").open()
