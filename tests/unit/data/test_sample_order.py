"""The data stream is a pure function of (data set, seed, round, epoch, position)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from job.data.batches import AugmentedImages, PlainImages
from job.data.layout import open_data
from job.data.loader import Loader, iterate_batches, report_uncaught
from job.data.preprocessing import Preprocessing
from job.data.sample_order import Draw, epoch_table
from job.data.samplers import GlobalBatches, RankShare
from job.data.splits import ArraySplit
from support.datasets import write_flat


def test_the_table_never_changes() -> None:
    table = epoch_table(5, seed=1, round_index=2, epoch=3)
    # computed once, apart from the package, with numpy.random.Philox: a change breaks every resume
    assert table.order.tolist() == [2, 4, 3, 0, 1]
    first = [0.25588515406253887, 0.3870103995531998, 0.010157689684280213]
    assert table.uniforms[0, :3].tolist() == first
    assert 0 <= table.uniforms.min() < table.uniforms.max() < 1


@pytest.mark.parametrize("change", [{"seed": 2}, {"round_index": 3}, {"epoch": 4}])
def test_each_key_gives_another_table(change: dict[str, int]) -> None:
    key = {"seed": 1, "round_index": 2, "epoch": 3}
    one, other = epoch_table(100, **key), epoch_table(100, **(key | change))
    assert one.order.tolist() != other.order.tolist()
    assert sorted(other.order.tolist()) == list(range(100))
    assert not np.isclose(one.uniforms, other.uniforms).any()


@pytest.mark.parametrize("count", [1, 7, 10, 33])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_global_batches_are_the_same_for_any_number_of_processes(count: int, world: int) -> None:
    def batches(rank: int, world: int) -> list[list[Draw]]:
        sampler = GlobalBatches(count, 4, seed=0, rank=rank, world=world)
        sampler.set_epoch(1, 2)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    alone = batches(0, 1)
    shares = [batches(rank, world) for rank in range(world)]
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        assert sorted(d.index for part in parts for d in part) == sorted(d.index for d in whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert {d for part in parts for d in part} == set(whole)
    assert sorted(d.index for whole in alone for d in whole) == list(range(count))
    assert [len(b) for b in alone] == GlobalBatches(count, 4, 0, 0, 1).sizes()
    seen = [i for rank in range(world) for b in RankShare(count, 4, rank, world) for i in b]
    assert sorted(seen) == list(range(count))


def test_the_same_images_come_with_any_number_of_workers(tmp_path: Path) -> None:
    write_flat(tmp_path, {"training": 5})
    images = AugmentedImages(
        open_data(str(tmp_path)).splits["training"], Preprocessing.of("homework", 32)
    )
    runs = []
    for workers in (0, 1, 2):
        sampler = GlobalBatches(15, 4, seed=0, rank=0, world=1)
        batches = iterate_batches(Loader(images, sampler, workers=workers, pin=False))
        runs.append([(images.clone(), labels.clone()) for images, labels in batches])
    for other in runs[1:]:
        for (images, labels), (same_images, same_labels) in zip(runs[0], other, strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


def draw(**values: float) -> Draw:
    middle = {"top": 0.5, "left": 0.5, "flip": 0.9, "angle": 0.5, "area": 0.5, "ratio": 0.5}
    return Draw(0, **(middle | values))


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_homeworks_crop_flip_and_rotation_equal_torchvisions() -> None:
    preset = Preprocessing.of("homework", 64)
    image = photo(100, 90)
    ours = preset.train(image, draw(top=0.99999, left=0.0, flip=0.1, angle=1.0))
    theirs = F.rotate(F.hflip(F.crop(image, 90 - 64, 0, 64, 64)), 15.0)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    # a small image: RandomCrop(pad_if_needed=True, padding_mode="symmetric") pads both sides
    small = photo(20, 70)
    ours = preset.train(small, draw(top=0.0, left=0.0))
    padded = np.pad(np.asarray(small), ((0, 0), (44, 44), (0, 0)), "symmetric")
    assert np.array_equal(np.asarray(ours), padded[:64, :64])


def test_angles_and_crops_cover_their_whole_range() -> None:
    table = epoch_table(20_000, 0, 0, 0).rows(range(20_000))
    angles = [2 * d.angle - 1 for d in table]
    assert -1 <= min(angles) < -0.99 < 0.99 < max(angles) <= 1
    assert abs(np.mean([d.flip < 0.5 for d in table]) - 0.5) < 0.02
    tops = np.bincount([int(d.top * 9) for d in table], minlength=9)
    assert len(tops) == 9
    assert tops.min() > 20_000 / 9 * 0.9


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (40, 20), (32, 32)])
def test_whole_batches_of_arrays_equal_one_image_at_a_time(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, *shape), dtype=np.uint8)
    split = ArraySplit(images, np.arange(9, dtype=np.int64))
    preset = Preprocessing.of("small", 32)
    draws = epoch_table(9, 0, 0, 0).rows(range(9))
    whole, labels = AugmentedImages(split, preset).__getitems__(draws)  # type: ignore[misc]
    single = [np.asarray(preset.train(split.image(d.index), d)) for d in draws]
    assert np.array_equal(whole.numpy(), np.stack(single))
    assert labels.tolist() == [d.index for d in draws]
    plain, _ = PlainImages(split, preset).__getitems__([3, 1])  # type: ignore[misc]
    single = [np.asarray(preset.evaluate(split.image(i))) for i in (3, 1)]
    assert np.array_equal(plain.numpy(), np.stack(single))


def test_a_grey_28_becomes_three_channels_padded_to_32() -> None:
    split = ArraySplit(np.full((1, 28, 28), 255, np.uint8), np.zeros(1, np.int64))
    images, _ = PlainImages(split, Preprocessing.of("small", 32)).__getitems__([0])  # type: ignore[misc]
    inputs = Preprocessing.of("small", 32).to_input(images)
    assert inputs.shape == (1, 3, 32, 32)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert inputs[0, :, 2:30, 2:30].eq(1).all()
    assert inputs.sum() == 3 * 28 * 28


def test_the_imagenet_preset_equals_torchvisions_recipe() -> None:
    preset = Preprocessing.of("imagenet", 224)
    image = photo(400, 300)
    centre = F.center_crop(F.resize(image, 256), [224, 224])
    assert np.array_equal(np.asarray(preset.evaluate(image)), np.asarray(centre))
    scaled = preset.to_input(torch.from_numpy(np.asarray(centre).copy())[None])
    reference = F.normalize(F.to_tensor(centre), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(scaled[0], reference)
    whole = preset.train(image, draw(area=0.9999999, ratio=1.0, top=0, left=0))
    assert whole.size == (224, 224)
    tiny = preset.train(photo(3, 900), draw(area=0.0))
    assert tiny.size == (224, 224)


def test_an_empty_share_of_a_batch_is_an_empty_batch(tmp_path: Path) -> None:
    write_flat(tmp_path, {"training": 1})
    split = open_data(str(tmp_path)).splits["training"]
    images, labels = AugmentedImages(split, Preprocessing.of("homework", 32)).__getitems__([])  # type: ignore[misc]
    assert images.shape == (0, 32, 32, 3)
    assert labels.shape == (0,)


def test_a_worker_does_not_report_that_the_job_has_left(capsys: pytest.CaptureFixture[str]) -> None:
    """A second Ctrl-C may come while its thread hands a tensor out."""
    report_uncaught(ConnectionResetError, ConnectionResetError("reset by peer"), None)
    assert capsys.readouterr().err == ""
    report_uncaught(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err
