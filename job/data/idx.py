"""IDX files, the format of the MNIST family (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from job.errors import DataError, reading, shown

if TYPE_CHECKING:
    from pathlib import Path

_CODES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DTYPES: dict[int, np.dtype[Any]] = {code: np.dtype(name) for code, name in _CODES.items()}


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """The array of an IDX file, gzipped or not; raises DataError when it is not whole."""
    try:
        with reading(path):
            content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise DataError(f"{shown(path)} is not an IDX file: its first four bytes are wrong")
    dtype, dimensions = _DTYPES[content[2]], content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{shown(path)} is cut short inside its header")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise DataError(
            f"{shown(path)} has {len(content):,} bytes where {shape} needs {expected:,}"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)
