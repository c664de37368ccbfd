"""With --on-bad-image skip an image that fails after the check is left out too."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from PIL import Image

import job.data.loader as batches_module
import job.data.splits as splits_module
from job.data.batches import AugmentedImages
from job.data.image_check import check_images
from job.data.images import load_rgb
from job.data.layout import open_data
from job.data.loader import Loader, iterate_batches
from job.data.preprocessing import Preprocessing
from job.data.samplers import GlobalBatches
from job.errors import DataError
from support.brightness import call, predict
from support.datasets import write_flat


def lose(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """From now on the files ``names`` cannot be read."""

    def load(path: Path) -> Image.Image:
        if path.name in names:
            raise DataError(f"{path} cannot be read as an image: lost")
        return load_rgb(path)

    monkeypatch.setattr(splits_module, "load_rgb", load)
    monkeypatch.setattr(batches_module, "_reported", set())


def stream(root: Path, on_bad_image: str, world: int = 1, workers: int = 0) -> list[torch.Tensor]:
    """The global batches of two epochs, put together from all ranks' shares."""
    checked_data, _ = check_images(open_data(str(root)), ["training"], on_bad_image)
    images = AugmentedImages(checked_data.splits["training"], Preprocessing.of("homework", 32))
    shares: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for rank in range(world):
        sampler = GlobalBatches(15, 6, 0, rank, world)
        batches = Loader(images, sampler, workers=workers, pin=False)
        for epoch in range(2):
            sampler.set_epoch(0, epoch)
            shares[rank] += [batch.clone() for batch, _ in iterate_batches(batches)]
    return [
        torch.stack([image for row in zip_longest(*parts) for image in row if image is not None])
        for parts in zip(*shares, strict=True)
    ]


def test_another_image_of_the_class_stands_in_the_same_one_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_flat(tmp_path, {"training": 5})
    whole = stream(tmp_path, "skip")
    lose(monkeypatch, "1_2.png", "1_3.png")
    lost = stream(tmp_path, "skip")
    said = capsys.readouterr().err
    assert said.count("1_2.png cannot be read as an image: lost; from now on another") == 1
    assert said.count("1_3.png") == 1
    twice = stream(tmp_path, "skip", world=2)
    assert all(torch.equal(one, two) for one, two in zip(lost, twice, strict=True))
    same = [
        torch.equal(image, other)
        for one, two in zip(whole, lost, strict=True)
        for image, other in zip(one, two, strict=True)
    ]
    assert same.count(False) == 4  # two files, two epochs: nothing else moves
    with pytest.raises(DataError, match="lost"):
        stream(tmp_path, "fail")
    lose(monkeypatch, *(f"1_{n}.png" for n in range(5)))
    with pytest.raises(DataError, match="lost"):
        stream(tmp_path, "skip")


def test_evaluation_and_predictions_leave_it_out(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lose(monkeypatch, "1.png")
    skip = ("--workers", 0, "--on-bad-image", "skip")
    done = call("evaluate", run, "--json", *skip)
    record = json.loads(done.stdout)
    assert (record["count"], record["accuracy"]) == (12, 1.0)  # of each class 0.png is left
    assert 0 < record["loss"] < 1
    assert "from now on another image" in done.stderr
    assert [row["Id"] for row in predict(run, *skip)] == ["0", *map(str, range(2, 12))]
    fails = call("evaluate", run, "--workers", 0)
    assert fails.exit_code == 65
    assert "1.png cannot be read" in fails.output
