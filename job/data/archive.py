"""Archives of images, read without unpacking: zip, tar, compressed tar, WebDataset shards.

Members are read in place by their offset. Nothing is written under a name that an archive contains.
An archive with an unsafe member, e.g. a link, is refused as a whole.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from job.data.archive_index import Member, index_of
from job.data.unpacked_tar import unpacked_tar
from job.errors import DataError, reading, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TARS, COMPRESSED_TARS = (".tar",), (".tar.gz", ".tgz")
ARCHIVES = (".zip", *TARS, *COMPRESSED_TARS)


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive, by its suffix."""
    return path.name.lower().endswith(ARCHIVES)


def open_archive(path: Path) -> ArchivePath:
    """Return the root of an archive; raises DataError, or StorageError if it cannot be read."""
    return ArchivePath(_archive((path,), _versions((path,))))


def open_archives(paths: Sequence[Path]) -> ArchivePath:
    """Return a root with a folder for each of several archives, named as its file."""
    return ArchivePath(_archive(tuple(paths), _versions(paths)))


def _versions(paths: Sequence[Path]) -> tuple[tuple[int, int, int], ...]:
    with reading(paths[0]):
        states = [path.stat() for path in paths]
    return tuple((state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states)


@lru_cache(maxsize=4)
def _archive(paths: tuple[Path, ...], versions: tuple[tuple[int, int, int], ...]) -> Archive:
    members: dict[str, Member] = {}
    for number, path in enumerate(paths):
        prefix = f"{path.name}/" if len(paths) > 1 else ""
        for name, member in index_of(path, _plain(path)).items():
            members[prefix + name] = member.in_file(number)
    return Archive(paths, versions, members)


def _plain(path: Path) -> Path:
    """Return the file from which members are read: ``path``, or the unpacked compressed tar."""
    return unpacked_tar(path) if path.name.lower().endswith(COMPRESSED_TARS) else path


@dataclass(frozen=True, eq=False)
class Archive:
    """Members of one or several archive files, by name."""

    paths: tuple[Path, ...]
    versions: tuple[tuple[int, int, int], ...]  # size, mtime_ns and ctime_ns of each file
    members: Mapping[str, Member] = field(repr=False)
    _open: dict[int, BinaryIO] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Archive, (self.paths, self.versions, self.members)

    @cached_property
    def folders(self) -> dict[str, list[str]]:
        """The names in each folder, sorted; the root is ""."""
        names: dict[str, set[str]] = defaultdict(set)
        names[""] = set()
        for path in self.members:
            while path:
                folder, name = posixpath.split(path)
                if name in names[folder]:
                    break
                names[folder].add(name)
                path = folder
        return {folder: sorted(inside) for folder, inside in names.items()}

    def read(self, name: str) -> bytes:
        """Return the content of a member; raises DataError if it is damaged, or OSError."""
        member = self.members[name]
        file = self._open.get(member.file)
        if file is None:  # threads that open it at the same time share the first one's file
            opened = _plain(self.paths[member.file]).open("rb")
            file = self._open.setdefault(member.file, opened)
        content = member.read(file.fileno())
        if content is None:
            raise DataError(f"{shown(ArchivePath(self, name))} is damaged in the archive")
        return content


@dataclass(frozen=True)
class MemberStatus:
    """Size of a member and times of its archive, as in ``os.stat_result``."""

    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int


@dataclass(frozen=True)
class ArchivePath:
    """File or folder in an archive, with the methods of ``pathlib.Path`` to read it."""

    archive: Archive
    inner: str = ""  # "" is the root

    def __fspath__(self) -> str:
        return os.path.join(self.archive.paths[0], self.inner)  # noqa: PTH118

    __str__ = __fspath__

    def __truediv__(self, path: str) -> ArchivePath:
        joined = posixpath.normpath(posixpath.join("/", self.inner, path)).strip("/")
        return ArchivePath(self.archive, joined)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.inner) or self.archive.paths[0].name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def parent(self) -> ArchivePath:
        """The folder that contains it."""
        return ArchivePath(self.archive, posixpath.dirname(self.inner))

    def relative_to(self, other: ArchivePath) -> str:
        """Return the path relative to ``other``, which contains it."""
        return posixpath.relpath(self.inner or ".", other.inner or ".")

    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        return self.inner in self.archive.folders

    def is_file(self) -> bool:
        """Return whether it is a file."""
        return self.inner in self.archive.members

    def exists(self) -> bool:
        """Return whether it is in the archive."""
        return self.is_dir() or self.is_file()

    def is_symlink(self) -> bool:
        """Return False: archives with links are refused."""
        return False

    def names(self) -> list[str]:
        """Return the names in this folder, sorted, without hidden names and __MACOSX."""
        names = self.archive.folders.get(self.inner, [])
        return [name for name in names if not name.startswith(".") and name != "__MACOSX"]

    def stat(self) -> MemberStatus:
        """Return the size of the file, with the times of its archive; raises FileNotFoundError."""
        if not self.is_file():
            raise FileNotFoundError(2, "it is not in the archive", str(self))
        member = self.archive.members[self.inner]
        _, modified, changed = self.archive.versions[member.file]
        return MemberStatus(member.size, modified, changed)

    def open(self, _mode: str = "rb") -> BinaryIO:
        """Open the file to read bytes; raises OSError or DataError."""
        self.stat()
        return io.BytesIO(self.archive.read(self.inner))


FilePath = Path | ArchivePath  # a file on disk or in an archive
