"""Batches on the device: rotated there to Pillow's pixels, and copied one ahead."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from job.data.batches import AugmentedImages, Batch, IncompleteBatch, UnrotatedBatch
from job.data.device_batches import move_batches
from job.data.loader import Loader, iterate_batches
from job.data.preprocessing import Preprocessing, _per_channel
from job.data.rotation import rotate_batch, rotation_coefficients
from job.data.sample_order import epoch_table
from job.data.samplers import GlobalBatches
from job.data.splits import ArraySplit

CPU = torch.device("cpu")


def noise(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 97, 224, 256])
def test_a_batch_is_rotated_to_the_pixels_of_pillow(size: int) -> None:
    angles = [0.0, 15.0, -15.0, 1e-9, -1e-9, 7.123456789, -3.3, 90.0, 45.0, 0.2]
    drawn = np.random.default_rng(1).uniform(-15, 15, 30).tolist()
    angles = [angle for angle in [*angles, *drawn] if angle != 90 or size % 2 == 0]
    images = noise(len(angles), size)
    ours = rotate_batch(torch.from_numpy(images), rotation_coefficients(angles, size))
    for image, rotated, angle in zip(images, ours, angles, strict=True):
        expected = np.asarray(Image.fromarray(image).rotate(angle))
        assert np.array_equal(rotated.numpy(), expected), angle


def test_no_image_is_rotated_to_no_image() -> None:
    empty = torch.zeros(0, 8, 8, 3, dtype=torch.uint8)
    assert rotate_batch(empty, rotation_coefficients([], 8)).shape == empty.shape


@pytest.mark.parametrize("preset", ["homework", "small", "imagenet"])
@pytest.mark.parametrize("size", [24, 40])
def test_training_images_are_the_same_wherever_they_are_rotated(preset: str, size: int) -> None:
    split = ArraySplit(noise(9, 33), np.arange(9, dtype=np.int64))
    preprocessing = Preprocessing.of(preset, size)
    sampler = GlobalBatches(9, 4, seed=3, rank=0, world=1)
    batches = []
    for later in (False, True):
        images = AugmentedImages(split, preprocessing, rotate_later=later)
        found = images.__getitems__(epoch_table(9, 3, 0, 0).rows(range(2)))
        assert isinstance(found, UnrotatedBatch) == (later and preset == "homework")
        loader = Loader(images, sampler, workers=0, pin=False)
        batches.append(list(iterate_batches(loader)))
    for (here, labels), (there, others) in zip(*batches, strict=True):
        assert torch.equal(here, there)
        assert torch.equal(labels, others)


def test_an_incomplete_batch_is_rotated_too() -> None:
    pixels = torch.from_numpy(noise(2, 16))
    batch = UnrotatedBatch(pixels, torch.tensor([0, 1]), rotation_coefficients([9.0, -4.0], 16))
    loader = [IncompleteBatch(batch, ("a.jpg cannot be read",)), batch]
    (first, _), (second, _) = iterate_batches(loader)  # type: ignore[arg-type]
    assert torch.equal(first, second)
    assert not torch.equal(first, pixels)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_one_batch_is_copied_ahead(count: int) -> None:
    """The streams of torch.cpu do nothing: what is left is the order."""
    made: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(count):
            made.append(number)
            yield torch.full((2, 4, 4, 3), number, dtype=torch.uint8), torch.tensor([number, 7])

    for number, (images, labels) in enumerate(move_batches(batches(), CPU, ahead=True)):
        assert made == list(range(min(count, number + 2)))
        assert images.unique().tolist() == [number]
        assert labels.tolist() == [number, 7]
    assert made == list(range(count))
    made.clear()
    for number, _ in enumerate(move_batches(batches(), CPU)):  # a CPU has nothing to overlap
        assert made == list(range(number + 1))


def test_mean_and_std_are_copied_to_the_device_once() -> None:
    mean = (0.1, 0.2, 0.3)
    with torch.inference_mode():
        constant = _per_channel(mean, CPU)
    assert _per_channel(mean, CPU) is constant
    assert not constant.is_inference()
    assert constant.flatten().tolist() == pytest.approx(mean)
