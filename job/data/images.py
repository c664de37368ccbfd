"""Picture files as the RGB that a viewer shows."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image, ImageOps

from job.errors import DataError, StorageError, reading, shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def load_rgb(path: Path) -> Image.Image:
    """Decode ``path``: EXIF rotation applied, transparency over white, 16-bit grey scaled to 8.

    Raises DataError that names the file when it is not a whole picture, StorageError when it
    cannot be told.
    """
    return _reading(path, _as_rgb)


def check_image(path: Path) -> tuple[int, int]:
    """Read ``path`` to its end and return its (width, height) as shown; raises as load_rgb.

    JPEG is decoded at an eighth of its size: every byte is still read, in a third of the time.
    """

    def check(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        if _orientation(image) >= 5:  # those that lie on their side
            width, height = height, width
        image.draft("RGB", (1, 1))
        image.load()
        return width, height

    return _reading(path, check)


def _reading(path: Path, read: Callable[[Image.Image], T]) -> T:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            with reading(path), Image.open(path) as image:
                return read(image)
    except StorageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a corrupt file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify image file" in reason:
            reason = "not a picture" if path.stat().st_size else "the file is empty"
        raise DataError(f"{shown(path)} cannot be read as a picture: {reason}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8; 1 where the block is damaged, as viewers take it."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # as in _reading: a damaged block, not a damaged picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    shown_image = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
    if shown_image.mode.startswith("I"):
        levels = np.asarray(shown_image, np.float32) * (255 / 65535)
        shown_image = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    if shown_image.has_transparency_data:
        layers = shown_image.convert("RGBA")
        paper = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(paper, layers).convert("RGB")
    return shown_image.convert("RGB")
