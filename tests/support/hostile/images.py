"""Images and data folders that are damaged, lie about themselves or are far too large."""

from __future__ import annotations

import io
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from support.hostile.case import (
    Args,
    Case,
    Originals,
    flips,
    linked,
    replaced,
    score,
    sparse,
    truncations,
)

FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"}
BAD, MAYBE = frozenset({65}), frozenset({0, 65})
HUGE = 12_000  # pixels a side: 144 megapixels, above what is read
LARGE = 9_000  # below it


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def noise(seed: int = 5, mode: str = "RGB") -> Image.Image:
    """An image of 40 x 32 noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(width: int, height: int, depth: int, colour: int, rows: int, row: bytes) -> bytes:
    """A PNG written by hand: its header says what it likes, ``row`` comes ``rows`` times."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    squeeze = zlib.compressobj(1)
    data = b"".join(squeeze.compress(b"\0" + row) for _ in range(rows)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def giants() -> Iterator[tuple[str, str, bytes]]:
    """Headers that claim far more than there is: (name, suffix, content)."""
    for width, height in ((60_000, 60_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 40)):
        yield f"png {width}x{height}", ".png", png(width, height, 8, 2, 1, b"\0" * 30)
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 1, 1, 0, 0)
        yield f"bmp {width}x{height}", ".bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head
    jpeg = bytearray(encoded(noise(), "JPEG"))
    place = jpeg.index(b"\xff\xc0")
    for height, width in ((65_535, 65_535), (60_000, 60_000), (0, 0)):
        jpeg[place + 5 : place + 9] = struct.pack(">HH", height, width)
        yield f"jpeg {width}x{height}", ".jpg", bytes(jpeg)
    canvas = struct.pack("<I", 2**24 - 1)[:3]
    vp8x = b"VP8X" + struct.pack("<II", 10, 0) + canvas + canvas
    yield "webp canvas", ".webp", b"RIFF" + struct.pack("<I", 22) + b"WEBP" + vp8x
    lossless = b"\x2f" + struct.pack("<I", 2**28 - 1) + b"\0" * 40
    body = b"WEBPVP8L" + struct.pack("<I", len(lossless)) + lossless
    yield "webp lossless", ".webp", b"RIFF" + struct.pack("<I", len(body)) + body


def contents(rng: random.Random) -> Iterator[tuple[str, str, bytes, frozenset[int]]]:
    """Damaged images of every format: (name, suffix, content, codes)."""
    for format, suffix in FORMATS.items():
        whole = encoded(noise(), format)
        for number, part in enumerate(truncations(rng, whole, 8)):
            spelt = (suffix, suffix.upper(), ".jpeg" if suffix == ".jpg" else suffix.title())
            yield f"{format} cut {number}", spelt[number % 3], part, BAD
        for number, spoilt in enumerate(flips(rng, whole, 8, 1 + 30 * rng.randrange(2))):
            yield f"{format} flipped {number}", suffix, spoilt, MAYBE
        for length in (2, 8, 12, 26):
            yield f"{format} header of {length}", suffix, whole[:length], BAD
            yield (
                f"{format} header and noise {length}",
                suffix,
                whole[:length] + rng.randbytes(400),
                BAD,
            )
        yield f"{format} empty", suffix, b"", BAD
        yield f"{format} noise", suffix, rng.randbytes(500), BAD
        yield f"{format} zeros", suffix, bytes(5000), BAD
        yield f"{format} text", suffix, b"this is no image\n" * 9, BAD
        other = encoded(noise(), "PNG" if format != "PNG" else "BMP")
        yield f"{format} of another kind", suffix, other, frozenset({0})
    for name, suffix, content in giants():
        yield name, suffix, content, BAD
    zeros = bytes(HUGE * 3)
    yield "png bomb", ".png", png(HUGE, HUGE, 8, 2, HUGE, zeros), BAD
    yield "png bomb short of rows", ".png", png(HUGE, HUGE, 8, 2, 9, zeros), BAD
    yield from odd_kinds(rng)


def odd_kinds(rng: random.Random) -> Iterator[tuple[str, str, bytes, frozenset[int]]]:
    """Images of strange modes and sizes, and files of other kinds by an image's name."""
    yield "1x1", ".png", encoded(noise().crop((0, 0, 1, 1)), "PNG"), MAYBE
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        image = noise(mode="L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image, np.uint16) * 257)
        for number, spoilt in enumerate(flips(rng, encoded(image, "PNG"), 2, 3)):
            yield f"{mode} flipped {number}", ".png", spoilt, MAYBE
    cmyk = encoded(noise(mode="CMYK"), "JPEG")
    for number, part in enumerate([*truncations(rng, cmyk, 2), *flips(rng, cmyk, 2, 20)]):
        yield f"CMYK {number}", ".jpg", part, MAYBE
    frames = [noise(seed) for seed in range(3)]
    for format, suffix in (("WEBP", ".webp"), ("PNG", ".png"), ("GIF", ".jpg")):
        film = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        yield f"{format} film", suffix, film, MAYBE
        yield f"{format} film cut", suffix, film[:300], BAD
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(noise(), "JPEG", exif=exif)
    for number in range(6):
        spoilt = bytearray(turned)
        for place in range(24, 60, 6 - number % 3):
            spoilt[place] = rng.randrange(256)
        yield f"EXIF {number}", ".jpg", bytes(spoilt), MAYBE
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n(touched) (w) file\nshowpage\n"
    yield "PostScript", ".jpg", script, BAD
    yield "SVG", ".png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", BAD
    yield "TIFF", ".jpg", encoded(noise(), "TIFF")[:200], BAD
    yield "ICO", ".bmp", encoded(noise(), "ICO")[:200], BAD


def spoil_folder(
    content: bytes, name: str, command: int, originals: Originals, classes: bool, folder: Path
) -> Args:
    """A data set of which one image has ``content``, in the split that the command reads."""
    data = linked(originals.classes if classes else originals.flat, folder / "data")
    split = (("train", "val", "test") if classes else ("training", "validation", "testing"))[
        command
    ]
    replaced(data / split / ("1/" if classes else "") / f"1_77{name}", content)
    return score(originals, data, command)


def damaged(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """One damaged image among good ones, in both layouts of files, under three commands."""
    for number, (name, suffix, content, codes) in enumerate(contents(rng)):
        build = partial(spoil_folder, content, suffix, number % 3, originals, number % 2 == 1)
        yield Case("image", name, build, codes)


def large(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """Images just below the largest that is read, and very long ones, in every preset."""
    side = LARGE
    files = {
        "RGB": png(side, side, 8, 2, side, bytes(side * 3)),
        "RGBA": png(side, side, 8, 6, side, bytes(side * 4)),
        "grey and alpha": png(side, side, 8, 4, side, bytes(side * 2)),
        "16 bit": png(side, side, 16, 0, side, bytes(side * 2)),
        "wide": png(80_000_000, 1, 8, 0, 1, bytes(80_000_000)),
        "tall": png(1, 2_000_000, 8, 0, 2_000_000, b"\7"),
    }
    for name, content in files.items():
        for preset in ("homework", "small", "imagenet") if len(name) < 5 else ("imagenet",):

            def build(folder: Path, content: bytes = content, preset: str = preset) -> Args:
                data = linked(originals.flat, folder / "data")
                replaced(data / "validation" / "1_77.png", content)
                return score(originals, data, 1, "--transform", preset)

            yield Case("large image", f"{name} {preset}", build, MAYBE)

    for name in ("RGBA", "16 bit", "wide", "tall"):
        preset = {"RGBA": "homework", "16 bit": "small"}.get(name, "imagenet")

        def train(folder: Path, content: bytes = files[name], preset: str = preset) -> Args:
            data = linked(originals.flat, folder / "data")
            replaced(data / "training" / "1_77.png", content)
            return (*originals.prune(data, Path("$OUT/run")), "--transform", preset)

        yield Case("large image", f"{name} trained", train, MAYBE)


def places(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """What lies where an image, a split or a data set should: pipes, links, devices, folders."""

    def put(make: Callable[[Path], object], where: str) -> Callable[[int], Callable[[Path], Args]]:
        def of(command: int) -> Callable[[Path], Args]:
            def build(folder: Path) -> Args:
                data = linked(originals.flat, folder / "data")
                split = ("training", "validation", "testing")[command]
                path = data / where.format(split=split)
                path.unlink(missing_ok=True)
                make(path)
                return score(originals, data, command)

            return build

        return of

    makers: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "circle of links": lambda path: path.symlink_to(path.name),
        "broken link": lambda path: path.symlink_to("nowhere"),
        "folder": Path.mkdir,
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "sparse": lambda path: sparse(path, 10 << 30),
        "sparse png": lambda path: sparse(path, 10 << 30, encoded(noise(), "PNG")[:40]),
        "sparse bmp": lambda path: sparse(path, 10 << 30, encoded(noise(), "BMP")[:300]),
        "sparse webp": lambda path: sparse(
            path, 10 << 30, b"RIFF\xf0\xff\xff\xffWEBPVP8 \xe0\xff\xff\xff"
        ),
    }
    for name, make in makers.items():
        for command in range(3):
            codes = BAD if name != "sparse bmp" else MAYBE
            yield Case("place", name, put(make, "{split}/1_77.png")(command), codes)
    for name in ("pipe", "/dev/zero", "sparse", "broken link"):
        maker = makers[name]
        for where in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"):
            yield Case("place", f"IDX {name}", put(maker, where)(0))
    for name in ("pipe", "broken link", "circle of links", "/dev/zero", "sparse"):

        def build(folder: Path, name: str = name) -> Args:
            makers[name](folder / "data")
            return score(originals, folder / "data", 1)

        yield Case("place", f"data set {name}", build, frozenset({65, 66}))
    for kind in ("empty", "of empty folders", "archive", "only hidden", "training only"):
        yield Case(
            "place", f"data set {kind}", partial(empty_set, kind, originals), frozenset({65, 66})
        )


def empty_set(kind: str, originals: Originals, folder: Path) -> Args:
    """Data sets without what is asked for."""
    data = folder / "data"
    data.mkdir()
    if kind == "of empty folders":
        for split in ("training", "validation", "testing"):
            (data / split).mkdir()
    elif kind == "only hidden":
        replaced(data / "training" / ".1_1.png", b"")
    elif kind == "training only":
        replaced(data / "training" / "1_1.png", encoded(noise(), "PNG"))
        return score(originals, data, 0)
    elif kind == "archive":
        with tarfile.open(folder / "data.tar", "w") as archive:
            archive.add(originals.flat, "food-11")
        data = folder / "data.tar"
    return score(originals, data, 1)
