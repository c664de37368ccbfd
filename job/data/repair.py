"""Repair of images that viewers show but Pillow rejects.

These are PNG files with large text chunks and JPEG files without an end marker. Only parts without
pixels are removed or added; an image that lacks pixels remains an error.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

if TYPE_CHECKING:
    from job.data.archive import FilePath

PNG, JPEG, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
# chunks that determine pixels, transparency, frames and orientation
PNG_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
PNG_CHECKED = {b"tRNS", b"eXIf"}  # left out if damaged
MAX_CHECKED = 1 << 20  # bytes of such a chunk
MAX_JPEG = 1 << 28  # bytes of a JPEG that gets an end marker
# a decoder reads missing pixels from these bytes, which begin with a 1 bit; at an end marker, it
# reads them from 0 bits
FILLER = b"\xaa" + bytes(37 * n % 251 for n in range(1, 4096))


def repaired(path: FilePath) -> BinaryIO | None:
    """Open ``path`` as a file that Pillow can read; returns None if there is nothing to repair.

    Raises OSError.
    """
    with path.open("rb") as file:
        head = file.read(8)
        if head == PNG:
            return _without_texts(path, file)
        if head[:3] == JPEG and path.stat().st_size <= MAX_JPEG:
            return _with_end(head + file.read())
    return None


def _without_texts(path: FilePath, file: BinaryIO) -> BinaryIO | None:
    """Open a PNG without its texts and colour profiles, which may unpack to any size."""
    parts, size, left_out = [(0, len(PNG))], path.stat().st_size, False
    while len(header := file.read(8)) == 8:
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        if not kind.isalpha():  # not a chunk; without this, a file of zeros would never end
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
    if length > MAX_CHECKED:
        return False
    content, check = file.read(length), file.read(4)
    return zlib.crc32(kind + content) == int.from_bytes(check, "big")


class _Parts(io.RawIOBase):
    """Ranges (begin, end) of a file, read as one file without the bytes between them."""

    def __init__(self, path: FilePath, parts: list[tuple[int, int]]) -> None:
        self._file, self._parts, self._offset = path.open("rb"), parts, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        length = sum(end - begin for begin, end in self._parts)
        self._offset = max(0, offset + {0: 0, 1: self._offset, 2: length}[whence])
        return self._offset

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        before = 0
        for begin, end in self._parts:
            within = self._offset - before
            if within < end - begin:
                self._file.seek(begin + within)
                content = self._file.read(min(len(buffer), end - begin - within))
                buffer[: len(content)] = content
                self._offset += len(content)
                return len(content)
            before += end - begin
        return 0

    def close(self) -> None:
        self._file.close()
        super().close()


def _with_end(content: bytes) -> BinaryIO | None:
    """Add the end marker to a JPEG that lacks nothing else; returns None if it also lacks pixels.

    A decoder makes up missing pixels from the bytes that follow: if pixels are missing, two
    different ends give two different images.
    """
    if content.endswith(JPEG_END):
        return None
    content = content.removesuffix(JPEG_END[:1])
    whole = content + JPEG_END
    images = [_pixels(text) for text in (whole, content + FILLER + JPEG_END)]
    return io.BytesIO(whole) if images[0] == images[1] is not None else None


def _pixels(content: bytes) -> bytes | None:
    """Return the SHA-256 of the pixels of a JPEG; None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return hashlib.sha256(image.tobytes()).digest()
    except Exception:  # Pillow's decoders raise nearly anything on a corrupt file
        return None
