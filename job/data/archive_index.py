"""Index of the members of archive files, and checks that refuse unsafe archives."""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from job.errors import DataError, reading, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
MAX_RATIO = 100  # of unpacked to packed size; images have at most 10
UNCHECKED_SIZE = 64 << 20  # bytes; smaller unpacked files may have any ratio
ZIP_HEADER = 30  # bytes of a member's local header in a zip file, without its name
_DAMAGED = tarfile.TarError, zipfile.BadZipFile, EOFError
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """File in an archive: its ``size`` bytes are stored in ``packed`` bytes at ``offset``."""

    offset: int  # of the content; in a zip file, of the member's local header
    size: int
    packed: int
    method: int = STORED
    crc: int | None = None  # None in a tar file
    file: int = 0  # number of the archive file

    def in_file(self, number: int) -> Member:
        """Return the member as one of the archive file ``number``."""
        return replace(self, file=number) if number else self

    def read(self, descriptor: int) -> bytes | None:
        """Return the content, from the open archive; None if it is damaged. Raises OSError."""
        begin = self.offset
        if self.crc is not None:
            header = os.pread(descriptor, ZIP_HEADER, begin)
            if header[:4] != b"PK\3\4" or len(header) < ZIP_HEADER:
                return None
            begin += ZIP_HEADER + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        content = os.pread(descriptor, self.packed, begin)
        if self.method == DEFLATED:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                content = unpacker.decompress(content, self.size + 1)
            except zlib.error:
                return None
        intact = len(content) == self.size and (self.crc is None or zlib.crc32(content) == self.crc)
        return content if intact else None


def index_of(path: Path, plain: Path) -> dict[str, Member]:
    """Return the files in the archive ``path`` by name; ``plain`` is ``path`` or its unpacked tar.

    Raises DataError for a damaged archive, and for one with links, devices, paths outside the
    archive, duplicate names, encryption, or files that unpack to over 100 times their size.
    """
    is_zip = path.name.lower().endswith(".zip")
    members: dict[str, Member] = {}
    folders: set[str] = set()
    try:
        with reading(path):
            for raw, member in _zip_members(path) if is_zip else _tar_members(path, plain):
                name = _checked_name(path, raw)
                if name in members or (member and name in folders):
                    raise DataError(f"{shown(path)} has two files named {shown(name)}")
                if member:
                    members[name] = member
                folders.update(_parents(name) if member else (*_parents(name), name))
    except (*_DAMAGED, ValueError, NotImplementedError) as error:
        raise DataError(f"{shown(path)} cannot be read as an archive: {error}") from error
    if clash := next(iter(folders & members.keys()), None):
        raise DataError(f"{shown(path)} has a file and a folder named {shown(clash)}")
    return members


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _checked_name(path: Path, raw: str) -> str:
    parts = [part for part in raw.split("/") if part not in ("", ".")]
    if raw.startswith("/") or ".." in parts or "\0" in raw or not (parts or raw.strip("./") == ""):
        raise _refuse(path, raw, "a path that leads outside the archive")
    return "/".join(parts)


def _refuse(path: Path, name: str, what: str) -> DataError:
    return DataError(f"{shown(path)} is refused: {shown(name)} is {what}")


def _tar_members(path: Path, plain: Path) -> Iterator[tuple[str, Member | None]]:
    length = plain.stat().st_size
    with tarfile.open(plain, "r:") as archive:
        for info in archive:
            if info.isdir():
                yield info.name, None
                continue
            if info.issym() or info.islnk():
                raise _refuse(path, info.name, f"a link to {shown(info.linkname)}")
            if not info.isreg() or info.issparse():
                raise _refuse(path, info.name, "neither a file nor a folder")
            if info.offset_data + info.size > length:
                raise DataError(f"{shown(path)} is truncated inside {shown(info.name)}")
            yield info.name, Member(info.offset_data, info.size, info.size)
        end = archive.offset
    with plain.open("rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):  # tarfile ends at a damaged header without an error
            raise DataError(f"{shown(path)} is truncated or damaged at byte {end:,}")


def _zip_members(path: Path) -> Iterator[tuple[str, Member | None]]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        starts = [*sorted(info.header_offset for info in infos), archive.start_dir]
    following = dict(pairwise(starts))
    if len(following) < len(infos):
        raise DataError(f"{shown(path)} is refused: its files overlap")
    for info in infos:
        mode = info.external_attr >> 16
        if stat.S_ISLNK(mode):
            raise _refuse(path, info.filename, "a link")
        if info.is_dir():
            yield info.filename, None
            continue
        if info.flag_bits & 1:
            raise _refuse(path, info.filename, "encrypted")
        if info.compress_type not in (STORED, DEFLATED):
            raise _refuse(path, info.filename, "compressed by an unsupported method: use deflate")
        packed, size = info.compress_size, info.file_size
        if size > max(UNCHECKED_SIZE, MAX_RATIO * packed):
            raise _refuse(path, info.filename, f"a file of {size:,} bytes compressed to {packed:,}")
        if info.header_offset + ZIP_HEADER + packed > following[info.header_offset]:
            raise DataError(f"{shown(path)} is refused: its files overlap")
        method = info.compress_type
        yield info.filename, Member(info.header_offset, size, packed, method, info.CRC)
