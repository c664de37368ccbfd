"""Image files, decoded to RGB as image viewers show them."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from job.data.repair import repaired
from job.errors import DataError, StorageError, reading, reason, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from job.data.archive import FilePath

Result = TypeVar("Result")
# the suffix decides which files are images, the content how they are decoded
_AVIF = importlib.util.find_spec("PIL._avif") is not None  # optional in Pillow
# suffixes of listing version 1, see job.data.folders
IMAGE_SUFFIXES_1 = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
IMAGE_SUFFIXES = (
    *IMAGE_SUFFIXES_1,
    *(".jfif", ".jpe", ".pjpeg", ".mpo", ".apng", ".dib", ".gif", ".tif", ".tiff"),
    *((".avif",) if _AVIF else ()),
)
# formats accepted under any suffix, as GIFs are often named .jpg; others, e.g. PostScript, may
# start programs
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(("AVIF",) if _AVIF else ()))
MAX_PIXELS = 2**30 // 12  # 89 million, Pillow's own limit
BIG = 2**24  # pixels: larger images are decoded one at a time, smaller ones by all threads
STRIP = 2**22  # pixels converted at a time: a big image is held in memory twice, not five times
_one_big = threading.Lock()
# by EXIF orientation; ImageOps.exif_transpose is not used because it writes EXIF, which may fail
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_rgb(path: FilePath) -> Image.Image:
    """Decode ``path`` to RGB; only the first frame if there are several.

    Applies the EXIF rotation, puts transparent images on white, scales 16-bit grey to 8 bits.
    Raises DataError when the file is not a complete image, StorageError when it cannot be read.
    """
    with without_warnings():
        return _decode(path, _as_rgb)


def check_image(path: FilePath) -> tuple[int, int]:
    """Decode ``path`` as ``load_rgb`` does and return its (width, height); raises the same errors.

    A JPEG is decoded at an eighth of its size, which reads every byte in a third of the time.
    Threads that call it need one ``without_warnings()`` around all of them.
    """

    def check(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        if _orientation(image) >= 5:  # rotated by 90 or 270 degrees
            width, height = height, width
        image.draft("RGB", (1, 1))
        with one_big(width * height):
            _as_rgb(image)
        return width, height

    return _decode(path, check)


def one_big(pixels: int) -> AbstractContextManager[Any]:
    """Return a lock if an image of ``pixels`` is big, so that threads decode big images in turn."""
    return _one_big if pixels > BIG else nullcontext()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings. Not thread-safe: threads share the warning filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is our limit
        warnings.simplefilter("ignore", UserWarning)
        yield


def _decode(path: FilePath, read: Callable[[Image.Image], Result]) -> Result:
    """Apply ``read`` to the opened image; raises as ``load_rgb``."""
    try:
        with reading(path):
            if not path.is_file():  # opening a pipe would wait
                raise OSError(_NOT_A_FILE[path.exists(), path.is_symlink()])
            return _open(path, read)
    except StorageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a corrupt file
        why = reason(error)
        if "cannot identify image file" in why:
            why = "not an image" if path.stat().st_size else "the file is empty"
        raise DataError(f"{shown(path)} cannot be read as an image: {why}") from error


_NOT_A_FILE = {  # (exists, is a link)
    (True, False): "it is not a file",
    (True, True): "it is not a file",
    (False, True): "it is a broken link",
    (False, False): "it does not exist",
}


def _open(path: FilePath, read: Callable[[Image.Image], Result]) -> Result:
    """Apply ``read`` to the image in ``path``, or if that fails to its repaired content."""
    try:
        file: Any = path if isinstance(path, Path) else path.open()
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return read(_check_pixels(image))
    except (_TooLargeError, Image.DecompressionBombError):
        raise
    except Exception as error:  # as in _decode
        if isinstance(error, OSError) and error.errno:  # a storage error or a missing permission
            raise
        file = repaired(path)
        if file is None:
            raise
        with file, Image.open(file, formats=IMAGE_FORMATS) as image:
            return read(_check_pixels(image))


class _TooLargeError(ValueError):
    """An image of more than MAX_PIXELS."""


def _check_pixels(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise _TooLargeError(f"{image.width} x {image.height} pixels are too many")
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 if the block is damaged."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # as in _decode: a damaged block, not a damaged image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB; shared by the check and by every read of an image."""
    orientation = _orientation(image)
    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("its values have neither 8 nor 16 bits: the value of white is unknown")
    if image.format == "JPEG" and (orientation, image.mode) == (1, "RGB"):
        return image  # most images are not copied once more
    upright = image.transpose(_UPRIGHT[orientation]) if orientation > 1 else image
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
        white = Image.new("RGBA", layers.size, "white")
        image = Image.alpha_composite(white, layers)
    return image.convert("RGB")
