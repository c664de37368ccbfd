"""What lies in folders: images by their suffixes, and what is left out, counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from job.data.images import SUFFIXES, SUFFIXES_OF_OLD
from job.data.split_names import CANONICAL
from job.errors import DataError, reading, shown

# How folders are read. A run is resumed, and its held-out images are found again, by the listing
# that it was begun with: 1 knew fewer suffixes, and no split called dev.
CURRENT_LISTING = 2


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts 2.jpg before 10.jpg."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def visible(folder: Path) -> list[str]:
    """Names in ``folder``, sorted, without hidden ones; raises DataError or StorageError."""
    try:
        with reading(folder):
            names = os.listdir(folder)
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read: {error.strerror}") from error
    return sorted(name for name in names if not name.startswith("."))


@dataclass
class Lister:
    """Lists the images of a data set, and counts what it passes over."""

    listing: int = CURRENT_LISTING
    others: Counter[str] = field(default_factory=Counter)  # files that are not images, by suffix
    empty: list[str] = field(default_factory=list)  # class folders without images

    def split(self, name: str) -> str | None:
        """The canonical name of the split that a folder is called by."""
        known = None if self.listing == 1 and name.lower() == "dev" else name.lower()
        return CANONICAL.get(known or "")

    def is_image(self, name: str) -> bool:
        """Whether a file is an image by its name."""
        return name.lower().endswith(SUFFIXES_OF_OLD if self.listing == 1 else SUFFIXES)

    def images(self, folder: Path) -> list[str]:
        """Names of the images in ``folder`` itself, sorted."""
        names = visible(folder)
        for name in names:
            if not self.is_image(name) and not (folder / name).is_dir():
                self.others[Path(name).suffix.lower() or "no suffix"] += 1
        return [name for name in names if self.is_image(name)]

    def images_below(self, folder: Path) -> list[str]:
        """Images in ``folder`` and its visible sub-folders, as paths relative to its parent.

        Links are followed, but in no circle.
        """
        found, seen, root = [], set(), Path(os.path.realpath(folder))
        for place, inside, _ in os.walk(folder, followlinks=True):
            here = os.path.realpath(place)
            if here in seen or (root != Path(here) and root.is_relative_to(here)):
                inside.clear()
                continue
            seen.add(here)
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            found += [os.path.join(place, name) for name in self.images(Path(place))]  # noqa: PTH118
        parent = folder.parent
        return sorted((os.path.relpath(path, parent) for path in found), key=natural_key)

    def class_folders(self, folder: Path) -> dict[str, list[str]]:
        """Images below each sub-folder that has some, as paths relative to ``folder``."""
        found = {}
        for entry in visible(folder):
            if (folder / entry).is_dir():
                below = self.images_below(folder / entry)
                if below:
                    found[entry] = below
                else:
                    self.empty.append(shown(folder / entry))
        return found

    def notes(self) -> tuple[str, ...]:
        """One line on what is left out, or none."""
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
