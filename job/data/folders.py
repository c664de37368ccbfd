"""Folders of images: which files are images, which split a folder holds, what is left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from job.data.images import IMAGE_SUFFIXES, IMAGE_SUFFIXES_1
from job.data.split_names import CANONICAL
from job.errors import DataError, reading, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

# Version of the rules by which folders are read. A resumed run uses the version that it began with,
# so that it finds the same images: 1 knew fewer suffixes, and no split called dev.
CURRENT_LISTING = 2


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts 2.jpg before 10.jpg."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def visible(folder: Path) -> list[str]:
    """Names in ``folder`` that are not hidden, sorted; raises DataError or StorageError."""
    with _listing(folder):
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))


@contextmanager
def _listing(folder: Path) -> Iterator[None]:
    try:
        with reading(folder):
            yield
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read: {error.strerror}") from error


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in ``folder``, sorted, links to folders included.

    Raises DataError or StorageError.
    """
    with _listing(folder), os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            # the storage is asked about links alone: what an entry is comes with its name
            and (entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and _is_folder(entry)))
        )


def _is_folder(link: os.DirEntry[str]) -> bool:
    return Path(link.path).is_dir()


@dataclass
class Lister:
    """List the images of a data set, and count the files that are left out."""

    listing: int = CURRENT_LISTING
    others: Counter[str] = field(default_factory=Counter)  # files that are not images, by suffix
    empty: list[str] = field(default_factory=list)  # class folders without images

    def split_folders(self, root: Path, *, unique: bool = True) -> dict[str, Path]:
        """Folders in ``root`` that are named as splits, by the canonical name of the split.

        Raises DataError when a split has two folders, unless ``unique`` is False.
        """
        folders: dict[str, Path] = {}
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
        """Whether a file is an image by its suffix."""
        return name.lower().endswith(IMAGE_SUFFIXES_1 if self.listing == 1 else IMAGE_SUFFIXES)

    def images(self, folder: Path) -> list[str]:
        """Names of the images in ``folder`` itself, sorted."""
        names = visible(folder)
        for name in names:
            if not self.is_image(name) and not (folder / name).is_dir():
                self.others[Path(name).suffix.lower() or "no suffix"] += 1
        return [name for name in names if self.is_image(name)]

    def images_below(self, folder: Path) -> list[str]:
        """Images in ``folder`` and its visible sub-folders, as paths relative to its parent.

        Links are followed, each folder once.
        """
        paths, seen, root = [], set(), Path(os.path.realpath(folder))
        for place, inside, _ in os.walk(folder, followlinks=True):
            here = os.path.realpath(place)
            if here in seen or (root != Path(here) and root.is_relative_to(here)):
                inside.clear()
                continue
            seen.add(here)
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            paths += [os.path.join(place, name) for name in self.images(Path(place))]  # noqa: PTH118
        parent = folder.parent
        return sorted((os.path.relpath(path, parent) for path in paths), key=natural_key)

    def class_folders(self, folder: Path) -> dict[str, list[str]]:
        """Images below each sub-folder that has some, as paths relative to ``folder``."""
        classes = {}
        for entry in subfolders(folder):
            if images := self.images_below(folder / entry):
                classes[entry] = images
            else:
                self.empty.append(shown(folder / entry))
        return classes

    def notes(self) -> tuple[str, ...]:
        """A warning about what is left out, if anything is."""
        parts = []
        if count := self.others.total():
            kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in self.others.most_common(6))
            kinds += ", …" if len(self.others) > 6 else ""
            what = "file that is not an image" if count == 1 else "files that are not images"
            parts.append(f"{count:,} {what} by name ({kinds})")
        if self.empty:
            names = ", ".join(self.empty[:6]) + (", …" if len(self.empty) > 6 else "")
            parts.append(f"{len(self.empty):,} folders without images ({names})")
        return (f"warning: left out: {'; '.join(parts)}",) if parts else ()
