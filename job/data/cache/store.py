"""File of a cache: a manifest, an index of sizes and offsets, and the pixels of all images.

The first ``HEADER`` bytes hold the manifest as JSON, zeros until the file is complete. The index
(N, 5) int64 follows, with offset, width and height of each image, and the width and height in its
file; an image that could not be decoded has no width. An image is (height, width, 3) uint8, RGB.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from job.errors import DataError, reading, writing
from job.files import sync_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from job.data.geometry import Size

CACHE_FORMAT = 1
HEADER = 4096  # bytes
CHANNELS, COLUMNS = 3, 5
MAX_MAPPED = 64 << 20  # bytes of pixels that a process reads before it releases the mapped pages


@dataclass(frozen=True)
class StoreLayout:
    """Positions of the images in the file.

    ``sizes`` (N, 2) are widths and heights in the cache, ``original_sizes`` in the image files.
    """

    sizes: NDArray[np.int64]
    original_sizes: NDArray[np.int64]

    @property
    def index(self) -> NDArray[np.int64]:
        """Offset, width, height, and width and height in the file, of each image (N, 5)."""
        ends = self._start + np.cumsum(self.sizes.prod(1) * CHANNELS)
        offsets = np.concatenate([[self._start], ends[:-1]])
        return np.column_stack([offsets, self.sizes, self.original_sizes]).astype(np.int64)

    @property
    def _start(self) -> int:
        return HEADER + len(self.sizes) * COLUMNS * 8

    @property
    def length(self) -> int:
        """Length of the file in bytes."""
        return self._start + int(self.sizes.prod(1).sum()) * CHANNELS


class StoreWriter:
    """Writer of images into the existing file ``path``; several processes may write at a time.

    The methods raise StorageError.
    """

    def __init__(self, path: Path, layout: StoreLayout) -> None:
        self.path, self.layout, self.index = path, layout, layout.index
        with writing(path):
            self._file = os.open(path, os.O_RDWR)
            if os.fstat(self._file).st_size < layout.length:
                os.truncate(self._file, layout.length)

    def write(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Write image ``row`` (height, width, 3); raises DataError if it has another size."""
        offset, width, height = map(int, self.index[row, :3])
        if pixels.shape != (height, width, CHANNELS):
            raise DataError(f"the image has changed its size to {pixels.shape[1::-1]}")
        content = np.ascontiguousarray(pixels).data.cast("B")
        with writing(self.path):
            while content:
                count = os.pwrite(self._file, content, offset)
                content, offset = content[count:], offset + count

    def finish(self, key: str, missing: list[int]) -> None:
        """Complete the file: write the index, flush it with the pixels, then write the manifest.

        ``missing`` are the numbers of the images that could not be decoded.
        """
        index = self.index.copy()
        index[missing, 1:3] = 0
        content = index.astype("<i8").tobytes()
        manifest = {
            "format": CACHE_FORMAT,
            "key": key,
            "images": len(index),
            "bytes": self.layout.length,
            "index_sha256": hashlib.sha256(content).hexdigest(),
        }
        with writing(self.path):
            os.pwrite(self._file, content, HEADER)
            os.fsync(self._file)
            os.pwrite(self._file, json.dumps(manifest).encode(), 0)
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            os.close(self._file)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its final name; raises StorageError."""
    with writing(path):
        temporary.replace(path)
        sync_path(path.parent)


@dataclass
class StoredImages:
    """Images of a complete file, which is mapped at the first access.

    A copy in another process, e.g. a loader process, maps the file again.
    """

    path: Path
    index: NDArray[np.int64]
    _map: mmap.mmap | None = field(default=None, repr=False)
    _touched: int = 0  # bytes read since the mapped pages were released
    _shape: tuple[int, ...] | None = None  # of all images as one array; () if sizes differ

    @classmethod
    def open(cls, path: Path, key: str) -> StoredImages | None:
        """Open the file at ``path``; None unless it is complete and has this ``key``.

        Raises StorageError when the storage fails.
        """
        try:
            with reading(path), path.open("rb") as file:
                manifest = json.loads(file.read(HEADER).rstrip(b"\0") or b"{}")
                if (manifest.get("format"), manifest.get("key")) != (CACHE_FORMAT, key):
                    return None
                content = file.read(int(manifest["images"]) * COLUMNS * 8)
                complete = path.stat().st_size == manifest["bytes"]
                digest = hashlib.sha256(content).hexdigest()
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None
        if not complete or digest != manifest["index_sha256"]:
            return None
        return cls(path, np.frombuffer(content, "<i8").reshape(-1, COLUMNS))

    def __getstate__(self) -> dict[str, object]:
        state = {"_map": None, "_touched": 0, "_shape": self._shape}
        return {"path": self.path, "index": self.index, **state}

    def original_sizes(self, paths: Sequence[str]) -> dict[str, Size]:
        """Return the original (width, height) of each decoded image, by its path in ``paths``."""
        rows = self.index.tolist()
        return {path: (w, h) for path, (_, used, _, w, h) in zip(paths, rows, strict=True) if used}

    def has(self, row: int) -> bool:
        """Return whether image ``row`` is in the file."""
        return bool(self.index[row, 1])

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Return a view of image ``row``, (height, width, 3); raises StorageError."""
        offset, width, height = map(int, self.index[row, :3])
        length = height * width * CHANNELS
        flat = np.frombuffer(self._mapped(length), np.uint8, length, offset)
        return flat.reshape(height, width, CHANNELS)

    def array(self, count: int) -> NDArray[np.uint8] | None:
        """Return a view of all images (N, height, width, 3) if they have one size, else None.

        ``count`` of them are read next. Raises StorageError.
        """
        if self._shape is None:
            sizes = self.index[:, 1:3]
            same = len(sizes) and sizes.all() and (sizes == sizes[0]).all()
            self._shape = (len(sizes), int(sizes[0, 1]), int(sizes[0, 0])) if same else ()
        if not self._shape:
            return None
        images, height, width = self._shape
        length = height * width * CHANNELS
        mapped = self._mapped(count * length)
        flat = np.frombuffer(mapped, np.uint8, images * length, int(self.index[0, 0]))
        return flat.reshape(images, height, width, CHANNELS)

    def _mapped(self, length: int) -> mmap.mmap:
        """Return the mapped file; ``length`` bytes of pixels are read next."""
        if self._map is None:
            with reading(self.path), self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._touched += length
        if self._touched > MAX_MAPPED:
            # the pages stay in the system's cache, but no longer count as memory of this process
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = length
        return self._map
