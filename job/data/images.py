"""Picture files as the RGB that a viewer shows."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image, ImageOps

from job.errors import DataError, StorageError, reading, reason, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# by whatever name: a GIF is often called .jpg; others, as PostScript, would start other programs
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 2**30 // 12  # 89 million, Pillow's own limit
BIG = 2**24  # pixels: larger pictures are decoded one at a time, smaller ones by all threads
STRIP = 2**22  # pixels converted at a time: a big picture lies in memory twice, not five times
_one_big = threading.Lock()


def load_rgb(path: Path) -> Image.Image:
    """Decode ``path``: EXIF rotation applied, transparency over white, 16-bit grey scaled to 8.

    Raises DataError that names the file when it is not a whole picture, StorageError when it
    cannot be told.
    """
    with quiet():
        return _reading(path, _as_rgb)


def check_image(path: Path) -> tuple[int, int]:
    """Read ``path`` to its end and return its (width, height) as shown; raises as load_rgb.

    JPEG is decoded at an eighth of its size: every byte is still read, in a third of the time.
    Threads may call it, within one ``quiet()`` around them all.
    """

    def check(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        if _orientation(image) >= 5:  # those that lie on their side
            width, height = height, width
        image.draft("RGB", (1, 1))
        with _one_big if width * height > BIG else nullcontext():
            image.load()
        return width, height

    return _reading(path, check)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings back. Not for each of several threads: filters belong to all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS says it
        warnings.simplefilter("ignore", UserWarning)
        yield


def _reading(path: Path, read: Callable[[Image.Image], T]) -> T:
    try:
        with reading(path):
            if not path.is_file():  # a pipe would be waited for
                raise OSError("it is not a file" if path.exists() else "it is a link to nothing")
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                return read(image)
    except StorageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a corrupt file
        why = reason(error)
        if "cannot identify image file" in why:
            why = "not a picture" if path.stat().st_size else "the file is empty"
        raise DataError(f"{shown(path)} cannot be read as a picture: {why}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8; 1 where the block is damaged, as viewers take it."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # as in _reading: a damaged block, not a damaged picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
    if not (upright.mode.startswith("I") or upright.has_transparency_data):
        return upright.convert("RGB")
    rgb, rows = Image.new("RGB", upright.size), max(1, STRIP // upright.width)
    for top in range(0, upright.height, rows):
        strip = upright.crop((0, top, upright.width, min(top + rows, upright.height)))
        rgb.paste(_strip_as_rgb(strip), (0, top))
    return rgb


def _strip_as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image, np.float32) * (255 / 65535)
        image = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        paper = Image.new("RGBA", layers.size, "white")
        image = Image.alpha_composite(paper, layers)
    return image.convert("RGB")
