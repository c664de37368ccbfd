"""Images load as the RGB that a viewer shows; broken ones are named."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from job.data.image_check import check_images
from job.data.images import check_image, load_rgb
from job.data.layout import open_data
from job.errors import DataError
from support.datasets import write_flat

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
def test_a_senseless_orientation_leaves_the_image_upright(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    Image.new("RGB", (8, 4), RED).save(tmp_path / "a.jpg", exif=exif)
    assert load_rgb(tmp_path / "a.jpg").size == check_image(tmp_path / "a.jpg") == (8, 4)


def test_a_damaged_exif_block_does_not_refuse_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), RED).save(tmp_path / "a.png", exif=b"nothing of the kind")
    assert load_rgb(tmp_path / "a.png").size == check_image(tmp_path / "a.png") == (8, 4)


def broken(folder: Path, kind: str) -> Path:
    path = folder / "1_99.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if kind == "truncated":
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "text":
        path.write_text("this is no image")
    elif kind == "empty":
        path.touch()
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "folder"])
def test_a_broken_image_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    write_flat(tmp_path, {"training": 4})
    path = broken(tmp_path / "training", kind)
    for read in (load_rgb, check_image):
        with pytest.raises(DataError, match=r"1_99\.jpg cannot be read"):
            read(path)
    data = open_data(str(tmp_path))
    with pytest.raises(DataError, match="--on-bad-image skip"):
        check_images(data, ["training"], "fail")
    checked, largest = check_images(data, ["training"], "skip")
    assert checked.skipped == ("training/1_99.jpg",)
    assert len(checked.splits["training"]) == 12
    assert checked.splits["training"].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert largest == 42


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def noise(width: int = 24, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chunk(kind: bytes, content: bytes, check: int | None = None) -> bytes:
    check = zlib.crc32(kind + content) if check is None else check
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def signed_tag(turn: int) -> bytes:
    """An EXIF block with an orientation and a negative number, as some cameras write it."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, turn) + struct.pack("<HHIi", 0x0100, 9, 1, -5)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_shown_upright_whatever_else_exif_holds(
    tmp_path: Path, turn: int
) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = turn
    noise().save(path, exif=exif)
    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert (np.asarray(load_rgb(path)) == wanted).all()
    path.write_bytes(encoded(noise(), "JPEG", exif=signed_tag(turn)))
    assert load_rgb(path).size == check_image(path) == wanted.shape[1::-1]


LARGE_TEXT = zlib.compress(b"x" * 3_000_000)
EXTRAS = {
    "compressed text": chunk(b"zTXt", b"Comment\0\0" + LARGE_TEXT),
    "international text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE_TEXT),
    "plain text": chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000),
    "many texts": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    "colour profile": chunk(b"iCCP", b"p\0\0" + LARGE_TEXT),
    "a wrong sum": chunk(b"tEXt", b"Comment\0x", check=0),
    "a damaged gamma": chunk(b"gAMA", b"xy"),
}


@pytest.mark.parametrize("where", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_what_holds_no_pixels_never_refuses_a_png(tmp_path: Path, extra: str, where: bytes) -> None:
    palette = noise().convert("P")
    whole = encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))
    (tmp_path / "a.png").write_bytes(whole)
    at = whole.index(where) - 4
    (tmp_path / "b.png").write_bytes(whole[:at] + EXTRAS[extra] + whole[at:])
    plain, odd = load_rgb(tmp_path / "a.png"), load_rgb(tmp_path / "b.png")
    assert (np.asarray(plain) == np.asarray(odd)).all()
    assert pixel(tmp_path / "b.png") == (255, 255, 255)
    assert check_image(tmp_path / "b.png") == (24, 16)
    begin, stop = whole.index(b"IDAT") - 4, whole.index(b"IDAT") + 30
    cut = whole[:begin] + EXTRAS[extra] + whole[begin:stop]
    (tmp_path / "c.png").write_bytes(cut)
    for read in (load_rgb, check_image):
        with pytest.raises(DataError, match=r"c\.png"):
            read(tmp_path / "c.png")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_may_lack_its_end_but_no_pixels(tmp_path: Path, progressive: bool) -> None:
    whole = encoded(noise(), "JPEG", progressive=progressive)
    (tmp_path / "a.jpg").write_bytes(whole)
    wanted = np.asarray(load_rgb(tmp_path / "a.jpg"))
    for lacks in range(1, 40):
        path = tmp_path / f"{lacks}.jpg"
        path.write_bytes(whole[:-lacks])
        if lacks <= 2:
            assert (np.asarray(load_rgb(path)) == wanted).all()
            assert check_image(path) == (24, 16)
        else:
            for read in (load_rgb, check_image):
                with pytest.raises(DataError, match="truncated"):
                    read(path)


@pytest.mark.parametrize(
    ("format", "mode"),
    [("TIFF", "RGB"), ("TIFF", "CMYK"), ("TIFF", "1"), ("TIFF", "RGBA"), ("GIF", "P"),
     ("AVIF", "RGB"), ("MPO", "RGB"), ("WEBP", "RGBA")],
)  # fmt: skip
def test_other_formats_are_read_by_their_first_frame(
    tmp_path: Path, format: str, mode: str
) -> None:
    frames = [Image.new("RGB", (16, 16), colour).convert(mode) for colour in (RED, "blue")]
    options: dict[str, object] = {"save_all": True, "append_images": frames[1:]}
    (tmp_path / "a.jpg").write_bytes(encoded(frames[0], format, **options))  # by a wrong name
    wanted = np.asarray(frames[0].convert("RGB"))[0, 0]
    np.testing.assert_allclose(pixel(tmp_path / "a.jpg"), wanted, atol=9)
    assert check_image(tmp_path / "a.jpg") == (16, 16)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_tiff_keeps_its_brightness(tmp_path: Path, order: str) -> None:
    Image.fromarray(np.full((4, 4), 32768, order)).save(tmp_path / "a.tif")
    assert pixel(tmp_path / "a.tif") == (128, 128, 128)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_what_has_no_white_is_refused_by_the_check_too(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "a.tif")
    for read in (load_rgb, check_image):
        with pytest.raises(DataError, match="8 nor 16 bits"):
            read(tmp_path / "a.tif")


def test_zeros_behind_a_header_are_no_chunks(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.write(encoded(noise(), "PNG")[:40])
        file.truncate(10 << 30)  # sparse: it takes no space
    for read in (load_rgb, check_image):
        with pytest.raises(DataError, match=r"a\.png"):
            read(tmp_path / "a.png")
