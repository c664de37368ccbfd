"""Compressed tar files, unpacked once per node to plain tar files in scratch.

A compressed tar can only be read from its beginning, but training reads images in random order.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from job.console import amount, phase, say
from job.data.archive_index import MAX_RATIO, UNCHECKED_SIZE
from job.data.cache.place import SPARE, prepare_folder, scratch_folder
from job.errors import DataError, StorageError, reading, shown, writing
from job.files import remove

if TYPE_CHECKING:
    from typing import BinaryIO

_CHUNK = 1 << 20  # bytes unpacked at a time
_unpacked: dict[tuple[str, int, int, int], Path] = {}  # by path, size, mtime_ns and ctime_ns


def unpacked_tar(path: Path) -> Path:
    """Return the plain tar file of ``path``, unpacked by the first process of the node.

    Raises DataError for a damaged file or one that unpacks to more than 100 times its size, and
    StorageError if there is too little space.
    """
    with reading(path):
        status = path.stat()
    identity = str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns
    if identity not in _unpacked or not _unpacked[identity].exists():
        folder = scratch_folder() or Path(tempfile.gettempdir()) / f"gammaslim-cache-{os.getuid()}"
        prepare_folder(folder)
        key = hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        final = folder / f"{key}.tar"
        with writing(folder), (folder / f".{key}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of the node wait here
            if not final.exists():
                _unpack(path, final)
        _unpacked[identity] = final
    return _unpacked[identity]


def _unpack(path: Path, final: Path) -> None:
    """Unpack ``path`` under a temporary name and rename it."""
    temporary = final.with_name(f".{final.name}.tmp")
    phase(f"unpacking {shown(path.name)}")
    try:
        with gzip.open(path) as source, temporary.open("wb") as target:
            size = _copy(path, source, target)
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(final)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{shown(path)} cannot be unpacked: {error}") from error
    finally:
        phase("")
        remove(temporary)
    say(f"data: {shown(path)} is unpacked to {shown(final)} ({amount(size)})")


def _copy(path: Path, source: gzip.GzipFile, target: BinaryIO) -> int:
    size, limit = 0, max(UNCHECKED_SIZE, MAX_RATIO * path.stat().st_size)
    while content := source.read(_CHUNK):
        size += len(content)
        if size > limit:
            raise DataError(f"{shown(path)} is refused: it unpacks to more than {limit:,} bytes")
        if shutil.disk_usage(target.name).free < len(content) + SPARE:
            raise StorageError(
                f"{shown(target.name)}: the disk is full; set TMPDIR to a larger one, or unpack "
                f"{shown(path)} and pass the folder to --data"
            )
        target.write(content)
    return size
