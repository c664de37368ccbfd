"""IDX files, the format of the MNIST family (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from contextlib import nullcontext
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np

from job.data.archive_index import MAX_RATIO, UNCHECKED_SIZE
from job.errors import DataError, reading, shown

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from job.data.archive import FilePath

_CODES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DTYPES: dict[int, np.dtype[Any]] = {code: np.dtype(name) for code, name in _CODES.items()}


MAX_DIMENSIONS = 4  # (N, height, width, 3)


def read_idx(path: FilePath) -> np.ndarray[Any, Any]:
    """Read the array of an IDX file, gzipped or not.

    Raises DataError for a file that is incomplete or longer than its header says, and for a gzip
    file that unpacks to more than a hundred times its size; StorageError when it cannot be read.
    """
    try:
        with reading(path), path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with reading(path), path.open("rb") as raw, _unpacked(raw, packed=packed) as file:
            dtype, shape = _read_header(path, file)
            expected = math.prod(shape) * dtype.itemsize
            size = path.stat().st_size
            if packed and expected > max(UNCHECKED_SIZE, MAX_RATIO * size):
                raise DataError(f"{shown(path)} unpacks to {expected:,} bytes from {size:,}")
            content = file.read(expected + 1) if packed or expected <= size else file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}") from error
    if len(content) != expected:
        has = "more" if len(content) > expected else f"{len(content):,}"
        raise DataError(f"{shown(path)} has {has} bytes, but shape {shape} needs {expected:,}")
    try:
        return np.frombuffer(content, dtype).reshape(shape)
    except ValueError as error:
        raise DataError(f"{shown(path)} cannot be of shape {shape}: {error}") from error


def _unpacked(raw: BinaryIO, *, packed: bool) -> AbstractContextManager[Any]:
    return gzip.GzipFile(fileobj=raw) if packed else nullcontext(raw)


def _read_header(
    path: FilePath, file: IO[bytes] | gzip.GzipFile
) -> tuple[np.dtype[Any], tuple[int, ...]]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        raise DataError(f"{shown(path)} is not an IDX file: its first four bytes are wrong")
    if magic[3] > MAX_DIMENSIONS:
        raise DataError(f"{shown(path)} has {magic[3]} dimensions; images and labels have 1 to 4")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{shown(path)} is truncated inside its header")
    return _DTYPES[magic[2]], struct.unpack(f">{magic[3]}I", sizes)
