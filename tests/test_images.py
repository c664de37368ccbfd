"""Pictures load as the RGB that a viewer shows; broken ones are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import gammaslim, write_flat
from job.data import check_pictures, open_data
from job.data.images import check_image, load_rgb
from job.errors import DataError

RED = (200, 30, 10)


def pixel(path: Path) -> tuple[int, ...]:
    image = load_rgb(path)
    assert image.mode == "RGB"
    return tuple(int(v) for v in np.asarray(image)[0, 0])


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("RGB", "a.png", RED),
        ("RGB", "a.webp", RED),
        ("RGB", "a.bmp", RED),
        ("RGB", "a.jpg", RED),
        ("L", "a.png", None),
        ("L", "a.jpeg", None),
        ("P", "a.png", None),
        ("CMYK", "a.jpg", RED),
        ("1", "a.png", None),
        ("LA", "a.png", None),
    ],
)
def test_every_mode_loads_as_rgb(
    tmp_path: Path, mode: str, name: str, expected: tuple[int, ...] | None
) -> None:
    source = Image.new("RGB", (16, 16), RED).convert(mode)
    source.save(tmp_path / name, quality=100, lossless=True)
    wanted = expected or tuple(int(v) for v in np.asarray(source.convert("RGB"))[0, 0])
    np.testing.assert_allclose(pixel(tmp_path / name), wanted, atol=4)


def test_transparency_lies_over_white_not_over_hidden_colours(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (*RED, 0)).save(tmp_path / "clear.png")
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "half.png")
    np.testing.assert_allclose(pixel(tmp_path / "half.png"), 127, atol=1)
    palette = Image.new("RGB", (4, 4), RED).convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert pixel(tmp_path / "palette.png") == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (128, 128, 128)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((4, 8, 3), np.uint8)
    upright[0, 0] = 255  # the top left corner
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    Image.fromarray(upright).save(tmp_path / "a.png", exif=exif)
    shown = np.asarray(load_rgb(tmp_path / "a.png"))
    assert shown.shape == (8, 4, 3)
    assert shown[0, 3].tolist() == [255, 255, 255]
    assert check_image(tmp_path / "a.png") == (4, 8)


@pytest.mark.parametrize("value", [9, 0])
def test_a_senseless_orientation_leaves_the_picture_upright(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    Image.new("RGB", (8, 4), RED).save(tmp_path / "a.jpg", exif=exif)
    assert load_rgb(tmp_path / "a.jpg").size == check_image(tmp_path / "a.jpg") == (8, 4)


def test_a_damaged_exif_block_does_not_refuse_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), RED).save(tmp_path / "a.png", exif=b"nothing of the kind")
    assert load_rgb(tmp_path / "a.png").size == check_image(tmp_path / "a.png") == (8, 4)


def broken(folder: Path, kind: str) -> Path:
    path = folder / "1_99.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if kind == "truncated":
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "text":
        path.write_text("this is no picture")
    elif kind == "empty":
        path.touch()
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "folder"])
def test_a_broken_picture_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    write_flat(tmp_path, {"training": 4})
    path = broken(tmp_path / "training", kind)
    for read in (load_rgb, check_image):
        with pytest.raises(DataError, match=r"1_99\.jpg cannot be read"):
            read(path)
    data = open_data(str(tmp_path))
    with pytest.raises(DataError, match="--on-bad-image skip"):
        check_pictures(data, ["training"], "fail")
    checked, largest = check_pictures(data, ["training"], "skip")
    assert checked.skipped == ("training/1_99.jpg",)
    assert len(checked.splits["training"]) == 12
    assert checked.splits["training"].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert largest == 42


def test_prune_ends_with_65_or_counts_and_lists_what_it_skips(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 4, "validation": 2})
    broken(data / "training", "truncated")
    common = ("prune", "--data", data, "--output", tmp_path / "run", "--dry-run")
    failed = gammaslim(*common)
    assert failed.code == 65, failed
    assert failed.err.count("\n") == 1
    assert "1_99.jpg" in failed.err
    skipped = gammaslim(*common, "--on-bad-image", "skip")
    assert skipped.code == 0, skipped
    assert "1 pictures cannot be read" in skipped.out
    assert "training/1_99.jpg" in skipped.out
