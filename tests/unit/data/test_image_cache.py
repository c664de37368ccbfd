"""The cache of decoded images: the same pixels, complete or absent, never in the way."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from job.data.batches import AugmentedImages, PlainImages
from job.data.cache import leader as leader_module
from job.data.cache import place as place_module
from job.data.cache import store as store_module
from job.data.cache.cached_split import CachedImage, CachedSplit, ImageCache
from job.data.cache.image_set import ImageSet
from job.data.cache.leader import CacheOptions
from job.data.cache.place import choose_place
from job.data.cache.sharing import share_cache
from job.data.cache.store import StoredImages
from job.data.image_check import check_images
from job.data.layout import open_data
from job.data.loader import Loader, iterate_batches
from job.data.preprocessing import Preprocessing
from job.data.sample_order import epoch_table
from job.data.samplers import GlobalBatches
from job.data.splits import ArraySplit
from job.distributed.stop import Watch
from job.errors import GammaslimError, OutputError, StorageError

SIZES = [(90, 70), (70, 90), (40, 200), (17, 9), (128, 128), (64, 64)]


def write_images(root: Path, sizes: list[tuple[int, int]] = SIZES, split: str = "training") -> Path:
    (root / split).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    for number, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / f"{number % 2}_{number}.png")
    return root


def image_set(root: Path, max_side: int | None = None) -> ImageSet:
    data, _ = check_images(open_data(str(root)), ["training"], "fail")
    images = ImageSet.of(data, ["training"], max_side)
    assert images
    return images.with_key()


def fill(images: ImageSet, folder: Path, mode: Any = "disk") -> StoredImages | None:
    options = CacheOptions(mode, None if mode == "ram" else str(folder), folder / "run")
    return share_cache(images, options, Watch(folder / "STOP", 300))


def cached(images: ImageSet, stored: StoredImages | None) -> CachedSplit:
    split = ImageCache(images, stored).over(images.split)
    assert isinstance(split, CachedSplit)
    return split


def test_caches_that_no_job_has_used_for_a_month_are_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = image_set(write_images(tmp_path / "first"))
    second = image_set(write_images(tmp_path / "second"))
    third = image_set(write_images(tmp_path / "third"))
    folder, day = tmp_path / "cache", 24 * 3600
    kept, old = fill(first, folder), fill(second, folder)
    assert kept
    assert old
    left, new = folder / f".{'0' * 32}.host.1.tmp", folder / ".new.host.1.tmp"
    foreign = folder / "notes.txt"
    for path in (left, new, foreign):
        path.write_text("x")
    for path in (kept.path, old.path, left, foreign):
        os.utime(path, (time.time() - 31 * day,) * 2)
    assert fill(first, folder)  # used again: it counts from now
    capsys.readouterr()
    assert fill(third, folder)
    assert "cache: 2 files unused for 30 days" in capsys.readouterr().out
    assert kept.path.exists()
    assert new.exists()
    assert foreign.exists()
    assert not old.path.exists()
    assert not left.exists()


@pytest.mark.parametrize("mode", ["disk", "ram"])
@pytest.mark.parametrize("max_side", [None, 60])
@pytest.mark.parametrize("preset", ["homework", "small", "imagenet"])
def test_batches_are_the_same_with_and_without_a_cache(
    tmp_path: Path, mode: str, max_side: int | None, preset: str
) -> None:
    images = image_set(write_images(tmp_path / "data"), max_side)
    stored = fill(images, tmp_path, mode)
    assert stored
    for row, (width, height) in enumerate(images.layout.sizes.tolist()):
        assert stored.pixels(row).shape == (height, width, 3)
        assert max(width, height) <= (max_side or 200)
    preprocessing = Preprocessing.of(preset, 48)
    preprocessing = Preprocessing.from_dict({**preprocessing.to_dict(), "max_side": max_side})
    draws = [draw for epoch in range(8) for draw in epoch_table(6, 1, 0, epoch).rows(range(6))]
    split = cached(images, stored)
    pairs = [
        [
            AugmentedImages(each, preprocessing).__getitems__(draws)
            for each in (images.split, split)
        ],
        [
            PlainImages(each, preprocessing).__getitems__(list(range(6)))
            for each in (images.split, split)
        ],
    ]
    for plain, fast in pairs:
        assert torch.equal(plain[0], fast[0])  # type: ignore[index]
        assert torch.equal(plain[1], fast[1])  # type: ignore[index]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_load_cached_images_for_a_cpu(tmp_path: Path, threads: int) -> None:
    images = image_set(write_images(tmp_path / "data", SIZES * 5))
    split = cached(images, None)
    preprocessing, sampler = Preprocessing.of("homework", 48), GlobalBatches(30, 4, 0, 0, 1)
    expected = list(Loader(AugmentedImages(split, preprocessing), sampler, workers=0, pin=False))
    loader = Loader(AugmentedImages(split, preprocessing), sampler, workers=threads, pin=False)
    split.cache.stored = fill(images, tmp_path)  # after the loader was built, as in a job
    for _ in range(2):
        for batch, same in zip(iterate_batches(loader), expected, strict=True):
            assert torch.equal(batch[0], same[0])
            assert torch.equal(batch[1], same[1])
    assert multiprocessing.active_children() == []
    first = next(iter(iterate_batches(loader)))  # and no more: a trial step, or a request to stop
    assert torch.equal(first[0], expected[0][0])
    gc.collect()
    assert [t.name for t in threading.enumerate() if "loader" in t.name] == []


def test_a_cached_image_that_cannot_be_read_ends_the_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = image_set(write_images(tmp_path / "data"))
    split = cached(images, fill(images, tmp_path))
    loader = Loader(
        PlainImages(split, Preprocessing.of("imagenet", 32)), [[0, 1], [2]], workers=1, pin=False
    )

    def fails(*_: object) -> object:
        raise StorageError("read error")

    monkeypatch.setattr(StoredImages, "pixels", fails)
    with pytest.raises(StorageError, match="read error"):
        list(iterate_batches(loader))


@pytest.mark.parametrize("size", [(20, 20), (60, 33), (32, 32)])
@pytest.mark.parametrize("max_side", [None, 24])
def test_images_of_one_size_are_augmented_in_whole_batches(
    tmp_path: Path, size: tuple[int, int], max_side: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = image_set(write_images(tmp_path / "data", [size] * 9), max_side)
    preprocessing = Preprocessing.of("small", 32)
    preprocessing = Preprocessing.from_dict({**preprocessing.to_dict(), "max_side": max_side})
    split = cached(images, fill(images, tmp_path / "cache")).select(np.arange(8, 1, -1))
    draws = [draw for epoch in range(4) for draw in epoch_table(7, 1, 0, epoch).rows(range(7))]
    single = [
        AugmentedImages(split.files, preprocessing).__getitems__(draws),
        PlainImages(split.files, preprocessing).__getitems__([4, 0, 6]),
    ]
    monkeypatch.setattr(CachedSplit, "image", None)  # not one by one
    whole = [
        AugmentedImages(split, preprocessing).__getitems__(draws),
        PlainImages(split, preprocessing).__getitems__([4, 0, 6]),
    ]
    for one, many in zip(single, whole, strict=True):
        assert torch.equal(one[0], many[0])  # type: ignore[index]
        assert torch.equal(one[1], many[1])  # type: ignore[index]


def test_arrays_are_reduced_too(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    split = ArraySplit(pixels, np.arange(3, dtype=np.int64))
    reduced = Preprocessing.from_dict({**Preprocessing.of("small", 32).to_dict(), "max_side": 32})
    images, _ = PlainImages(split, reduced).__getitems__([2])  # type: ignore[misc]
    small = Image.fromarray(pixels[2]).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(images[0].numpy(), np.asarray(small))


@pytest.mark.parametrize(
    "box", [(0, 0, 9, 7), (2, 3, 5, 6), (-2, -3, 5, 6), (4, 4, 20, 30), (-5, -5, 30, 30),
            (20, 0, 30, 5), (-9, 0, -2, 5)],
)  # fmt: skip
def test_a_crop_of_the_cache_equals_pillows(box: tuple[int, int, int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    ours, theirs = CachedImage(pixels).crop(box), Image.fromarray(pixels).crop(box)
    assert ours.size == theirs.size
    assert ours.tobytes() == theirs.tobytes()


def test_a_later_run_finds_it_and_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_set(write_images(tmp_path / "data"))
    assert fill(images, tmp_path)
    assert "built in" in capsys.readouterr().out

    def forbidden(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("job.data.splits.load_rgb", forbidden)
    stored = fill(image_set(tmp_path / "data"), tmp_path)
    assert stored
    assert "found" in capsys.readouterr().out
    known = stored.original_sizes(images.split.paths)
    monkeypatch.setattr("job.data.image_check.check_image", forbidden)
    data, largest = check_images(
        open_data(str(tmp_path / "data")), ["training"], "fail", known=known
    )
    assert largest == 200
    assert len(data.splits["training"]) == 6


def test_an_image_replaced_by_one_of_the_same_size_is_decoded_again(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", [(8, 8), (8, 8)])
    file = root / "training" / "0_0.png"
    before, times = image_set(root), file.stat()
    content = bytearray(file.read_bytes())
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and tar do
    assert image_set(root).key != before.key
    assert image_set(root, 4).key != image_set(root).key


@pytest.mark.parametrize("damage", ["truncated", "zeros", "other key", "index"])
def test_a_damaged_file_is_built_again(tmp_path: Path, damage: str) -> None:
    images = image_set(write_images(tmp_path / "data"))
    stored = fill(images, tmp_path)
    assert stored
    content = bytearray(stored.path.read_bytes())
    if damage == "truncated":
        content = content[:-1]
    elif damage == "zeros":
        content[: store_module.HEADER] = bytes(store_module.HEADER)
    elif damage == "index":
        content[store_module.HEADER + 3] ^= 1
    else:
        content = bytearray(content.replace(images.key.encode(), b"0" * 32))
    stored.path.write_bytes(content)
    assert StoredImages.open(stored.path, images.key) is None
    again = fill(images, tmp_path)
    assert again
    assert np.array_equal(again.pixels(2), np.asarray(images.split.image(2)))


@pytest.mark.parametrize("mode", ["auto", "disk"])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, write, written = image_set(write_images(tmp_path / "data")), os.pwrite, []

    def pwrite(*args: Any) -> int:
        written.append(args)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    monkeypatch.setattr(store_module.os, "pwrite", pwrite)
    if mode == "disk":
        with pytest.raises(StorageError, match="No space left on device; free some space"):
            fill(images, tmp_path / "cache", mode)
    else:
        assert fill(images, tmp_path / "cache", mode) is None
        assert "decoded in every epoch" in capsys.readouterr().out
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.undo()
    assert fill(images, tmp_path / "cache", mode)


@pytest.mark.parametrize("mode", ["auto", "disk", "ram"])
def test_a_file_that_may_not_be_that_large_ends_the_build(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def truncate(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")  # ulimit -f

    images = image_set(write_images(tmp_path / "data"))
    monkeypatch.setattr(store_module.os, "truncate", truncate)
    if mode == "auto":
        assert fill(images, tmp_path / "cache", mode) is None
    else:
        with pytest.raises(StorageError, match="File too large"):
            fill(images, tmp_path / "cache", mode)
    assert not list(tmp_path.glob("cache/.*.tmp"))


def test_too_little_space_is_an_error_with_advice_or_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place_module, "available_memory", lambda: 10 << 20)
    monkeypatch.setattr(place_module, "free_space", lambda _: 100 << 20)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    scratch = tmp_path / f"gammaslim-cache-{os.getuid()}"
    run, size = tmp_path / "run", 1 << 20
    assert choose_place("auto", None, run, size).folder == scratch
    assert choose_place("auto", None, run, 51 * size).reason.startswith("the decoded images take")
    assert choose_place("auto", "/elsewhere", run, size).folder == Path("/elsewhere")
    with pytest.raises(StorageError, match=r"needs 42 MB, but .* has 100 MB free: free some space"):
        choose_place("disk", None, run, 40 * size)
    with pytest.raises(StorageError, match="--cache ram needs 12 MB, but 10 MB of memory"):
        choose_place("ram", None, run, 11 * size)
    monkeypatch.delenv("TMPDIR")
    assert choose_place("disk", None, run, size).folder == run / "cache"
    assert choose_place("auto", None, run, 2 * size).memory
    small = choose_place("auto", None, run, 3 * size)  # never fills the run folder uninvited
    assert not small.exists
    assert not choose_place("off", None, run, 1).exists


def test_scratch_that_another_user_has_prepared_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    (tmp_path / "other").mkdir()
    (tmp_path / f"gammaslim-cache-{os.getuid()}").symlink_to(tmp_path / "other")
    images = image_set(write_images(tmp_path / "data"))
    watch = Watch(tmp_path / "STOP", 300)
    with pytest.raises(GammaslimError, match="belongs to another user"):
        share_cache(images, CacheOptions("disk", None, tmp_path / "run"), watch)
    assert share_cache(images, CacheOptions("auto", None, tmp_path / "run"), watch) is None


def test_a_folder_that_cannot_be_written_is_an_error_only_if_asked_for(tmp_path: Path) -> None:
    images = image_set(write_images(tmp_path / "data"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        fill(images, tmp_path / "file" / "cache", "disk")
    assert fill(images, tmp_path / "file" / "cache", "auto") is None


SLOW_BUILDER = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import job.data.cache.build as build
plain = build.ShareBuilder._decode
def slow(self, row):
    time.sleep(0.2)
    return plain(self, row)
build.ShareBuilder._decode = slow
from unit_image_cache import fill, image_set
fill(image_set(Path({data!r})), Path({cache!r}))
"""


def start_slow_builder(tmp_path: Path) -> subprocess.Popen[str]:
    tests = tmp_path / "modules"
    tests.mkdir(exist_ok=True)
    (tests / "unit_image_cache.py").write_text(Path(__file__).read_text())
    code = SLOW_BUILDER.format(
        tests=str(tests),
        root=str(Path(__file__).parents[3]),
        data=str(tmp_path / "data"),
        cache=str(tmp_path / "cache"),
    )
    process = subprocess.Popen([sys.executable, "-c", code], text=True)
    end = time.monotonic() + 60
    while not list((tmp_path / "cache").glob(".*.tmp")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_a_killed_builder_leaves_no_cache_and_blocks_nobody(tmp_path: Path) -> None:
    images = image_set(write_images(tmp_path / "data", SIZES * 20))
    process = start_slow_builder(tmp_path)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list((tmp_path / "cache").iterdir())
    assert any(path.suffix == ".tmp" for path in left)
    assert not any(path.suffix == ".images" for path in left)
    stored = fill(images, tmp_path / "cache")
    assert stored
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    assert np.array_equal(stored.pixels(5), np.asarray(images.split.image(5)))


def test_two_jobs_build_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_set(write_images(tmp_path / "data"))
    process = start_slow_builder(tmp_path)
    monkeypatch.setattr("job.data.cache.build.ShareBuilder._decode", None)  # the other one does it
    stored = fill(images, tmp_path / "cache")
    assert process.wait() == 0
    assert stored
    assert "found" in capsys.readouterr().out
    assert np.array_equal(stored.pixels(5), np.asarray(images.split.image(5)))


def test_a_stop_request_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_set(write_images(tmp_path / "data"))
    monkeypatch.setattr("job.distributed.stop.stop_requested", lambda: True)
    with pytest.raises(GammaslimError, match="stopped by request"):
        fill(images, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_an_image_lost_before_it_is_decoded_is_reported_by_its_reader(tmp_path: Path) -> None:
    images = image_set(write_images(tmp_path / "data"))
    (tmp_path / "data" / "training" / "1_1.png").write_bytes(b"no image")
    stored = fill(images, tmp_path / "cache")
    assert stored
    row = images.split.paths.index("training/1_1.png")
    assert not stored.has(row)
    assert "training/1_1.png" not in stored.original_sizes(images.split.paths)
    with pytest.raises(GammaslimError, match=r"1_1\.png cannot be read as an image"):
        cached(images, stored).image(row)


def test_memory_of_a_reader_does_not_grow_with_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_MAPPED", 1 << 20)
    images = image_set(write_images(tmp_path / "data", [(512, 490)] * 40))  # 30 MB
    stored = fill(images, tmp_path / "cache")
    assert stored

    def mapped() -> int:
        """KiB of the file that count as memory of this process."""
        maps = Path("/proc/self/smaps").read_text().split(str(stored.path))[1]
        return next(int(line.split()[1]) for line in maps.splitlines() if line.startswith("Rss"))

    most = 0
    for row in range(40):
        stored.pixels(row).sum()
        most = max(most, mapped())
    assert most <= 2 * 1024


def test_lock_files_of_storage_without_locks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(leader_module.fcntl, "flock", refuse)
    assert fill(image_set(write_images(tmp_path / "data")), tmp_path / "cache")
