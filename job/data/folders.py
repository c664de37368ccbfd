"""Listing of image folders: image files, split folders, class folders, and files left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from job.console import counted
from job.data.archive import ArchivePath, FilePath
from job.data.images import IMAGE_SUFFIXES, IMAGE_SUFFIXES_1
from job.data.split_names import CANONICAL
from job.errors import DataError, reading, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

# Version of the rules for listing folders. A resumed run keeps its version, to find the same
# images. Version 1 knew fewer suffixes and no split named dev, version 2 no metadata files.
CURRENT_LISTING = 3


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts 2.jpg before 10.jpg."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def visible(folder: FilePath) -> list[str]:
    """Return the visible names in ``folder``, sorted; raises DataError or StorageError."""
    if isinstance(folder, ArchivePath):
        return folder.names()
    with _listing(folder):
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))


@contextmanager
def _listing(folder: Path) -> Iterator[None]:
    try:
        with reading(folder):
            yield
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read: {error.strerror}") from error


def subfolders(folder: FilePath) -> list[str]:
    """Return the names of the visible folders in ``folder``, sorted, including links to folders.

    Raises DataError or StorageError.
    """
    if isinstance(folder, ArchivePath):
        return [name for name in folder.names() if (folder / name).is_dir()]
    with _listing(folder), os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            # scandir already knows the type of an entry; only links need another system call
            and (entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and _is_folder(entry)))
        )


def _is_folder(link: os.DirEntry[str]) -> bool:
    return Path(link.path).is_dir()


@dataclass
class Lister:
    """Lister of the images of a data set; counts the files that are left out."""

    listing: int = CURRENT_LISTING
    others: Counter[str] = field(default_factory=Counter)  # files that are not images, by suffix
    empty: list[str] = field(default_factory=list)  # class folders without images

    def split_folders(self, root: FilePath, *, unique: bool = True) -> dict[str, FilePath]:
        """Return the split folders in ``root``, by the canonical name of the split.

        Raises DataError when a split has two folders, unless ``unique`` is False.
        """
        folders: dict[str, FilePath] = {}
        for entry in subfolders(root):
            alias = entry.lower()
            split = None if self.listing == 1 and alias == "dev" else CANONICAL.get(alias)
            if split and split in folders and unique:
                first = folders[split].name
                raise DataError(
                    f"{shown(root)} has two {split} folders, {first} and {entry}: keep one"
                )
            if split:
                folders[split] = root / entry
        return folders

    def is_image(self, name: str) -> bool:
        """Return whether a file is an image, by its suffix."""
        return name.lower().endswith(IMAGE_SUFFIXES_1 if self.listing == 1 else IMAGE_SUFFIXES)

    def images(self, folder: FilePath) -> list[str]:
        """Return the names of the images directly in ``folder``, sorted."""
        names = visible(folder)
        for name in names:
            if not self.is_image(name) and not (folder / name).is_dir():
                self.others[Path(name).suffix.lower() or "no suffix"] += 1
        return [name for name in names if self.is_image(name)]

    def images_below(self, folder: FilePath) -> list[str]:
        """Return the images in ``folder`` and its visible sub-folders, relative to its parent.

        Follows links, but reads each folder only once.
        """
        if isinstance(folder, ArchivePath):
            inside = self._images_in_archive(folder)
            return sorted((path.relative_to(folder.parent) for path in inside), key=natural_key)
        paths, seen, root = [], set(), Path(os.path.realpath(folder))
        for directory, names, _ in os.walk(folder, followlinks=True):
            here = os.path.realpath(directory)
            if here in seen or (root != Path(here) and root.is_relative_to(here)):
                names.clear()
                continue
            seen.add(here)
            names[:] = sorted(name for name in names if not name.startswith("."))
            images = self.images(Path(directory))
            paths += [os.path.join(directory, name) for name in images]  # noqa: PTH118
        parent = folder.parent
        return sorted((os.path.relpath(path, parent) for path in paths), key=natural_key)

    def _images_in_archive(self, folder: ArchivePath) -> Iterator[ArchivePath]:
        yield from (folder / name for name in self.images(folder))
        for name in subfolders(folder):
            yield from self._images_in_archive(folder / name)

    def class_folders(self, folder: FilePath) -> dict[str, list[str]]:
        """Return the images below each sub-folder that has any, relative to ``folder``."""
        classes = {}
        for entry in subfolders(folder):
            if images := self.images_below(folder / entry):
                classes[entry] = images
            else:
                self.empty.append(shown(folder / entry))
        return classes

    def notes(self) -> tuple[str, ...]:
        """Return a warning about files and folders that are left out, if any."""
        parts = []
        if count := self.others.total():
            kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in self.others.most_common(6))
            kinds += ", …" if len(self.others) > 6 else ""
            noun = "file that is not an image" if count == 1 else "files that are not images"
            parts.append(f"{count:,} {noun} by name ({kinds})")
        if self.empty:
            names = ", ".join(self.empty[:6]) + (", …" if len(self.empty) > 6 else "")
            parts.append(f"{counted(len(self.empty), 'folder')} without images ({names})")
        return (f"warning: left out: {'; '.join(parts)}",) if parts else ()
