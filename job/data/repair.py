"""Files that viewers show and Pillow refuses: large texts within a PNG, a JPEG without its end.

Only what holds no pixels is left out or added: an image that lacks some stays refused.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

PNG, JPEG, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
# chunks that pixels, their transparency, frames and their orientation follow from
PNG_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
PNG_CHECKED = {b"tRNS", b"eXIf"}  # left out where damaged
LARGEST_CHECKED = 1 << 20  # bytes of one of these
LARGEST_JPEG = 1 << 28  # bytes that are completed
# what a decoder would take for pixels if it still waited for some; the first bit is not EOI's 0
FILLER = b"\xaa" + bytes(37 * n % 251 for n in range(1, 4096))


def repaired(path: Path) -> BinaryIO | None:
    """``path`` as a file that Pillow may read, or None where there is nothing to leave out or add.

    Raises OSError.
    """
    with path.open("rb") as file:
        head = file.read(8)
        if head == PNG:
            return _without_texts(path, file)
        if head[:3] == JPEG and path.stat().st_size <= LARGEST_JPEG:
            return _with_end(head + file.read())
    return None


def _without_texts(path: Path, file: BinaryIO) -> BinaryIO | None:
    """A PNG without texts and colour profiles, however far they unpack."""
    parts, size, left_out = [(0, len(PNG))], path.stat().st_size, False
    while len(header := file.read(8)) == 8:
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        if not kind.isalpha():  # no chunk: a file of zeros would be one for ever
            break
        begin, end = file.tell() - 8, file.tell() + length + 4
        if kind in PNG_KEPT and (kind not in PNG_CHECKED or _is_sound(file, kind, length)):
            parts.append((begin, min(end, size)))
        else:
            left_out = True
        if end >= size or kind == b"IEND":
            break
        file.seek(end)
    return io.BufferedReader(_Parts(path, parts)) if left_out else None


def _is_sound(file: BinaryIO, kind: bytes, length: int) -> bool:
    if length > LARGEST_CHECKED:
        return False
    content, check = file.read(length), file.read(4)
    return zlib.crc32(kind + content) == int.from_bytes(check, "big")


class _Parts(io.RawIOBase):
    """Stretches (begin, end) of a file, read as if nothing were between them."""

    def __init__(self, path: Path, parts: list[tuple[int, int]]) -> None:
        self._file, self._parts, self._place = path.open("rb"), parts, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        length = sum(end - begin for begin, end in self._parts)
        self._place = max(0, offset + {0: 0, 1: self._place, 2: length}[whence])
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        before = 0
        for begin, end in self._parts:
            within = self._place - before
            if within < end - begin:
                self._file.seek(begin + within)
                content = self._file.read(min(len(buffer), end - begin - within))
                buffer[: len(content)] = content
                self._place += len(content)
                return len(content)
            before += end - begin
        return 0

    def close(self) -> None:
        self._file.close()
        super().close()


def _with_end(content: bytes) -> BinaryIO | None:
    """A JPEG that lacks its end marker alone; None where it also lacks pixels.

    These would be made up from whatever follows: two things that may follow give two images.
    """
    if content.endswith(JPEG_END):
        return None
    content = content.removesuffix(JPEG_END[:1])
    whole = content + JPEG_END
    images = [_pixels(text) for text in (whole, content + FILLER + JPEG_END)]
    return io.BytesIO(whole) if images[0] == images[1] is not None else None


def _pixels(content: bytes) -> bytes | None:
    """A digest of the pixels of a JPEG; None where it has none."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return hashlib.sha256(image.tobytes()).digest()
    except Exception:  # Pillow's decoders raise nearly anything on a corrupt file
        return None
