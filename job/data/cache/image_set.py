"""Set of the images of a cache: a sorted list of files, their key, and their decoded sizes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import PIL
from PIL import features

from job import __version__
from job.data.cache.store import CACHE_FORMAT, StoreLayout
from job.data.geometry import limited_size
from job.data.splits import FileSplit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from job.data.dataset import Dataset
    from job.data.splits import Labels


@dataclass(frozen=True)
class ImageSet:
    """Images of one cache: ``split`` has each file once, sorted by path.

    ``max_side`` limits the sides of images in the cache. ``key`` is "" until it is computed.
    """

    split: FileSplit
    max_side: int | None = None
    key: str = ""

    @classmethod
    def of(
        cls, data: Dataset, names: Iterable[str], max_side: int | None = None
    ) -> ImageSet | None:
        """Return the images of the splits ``names``; None if they are not files."""
        splits = [split for name in names if (split := data.splits.get(name)) is not None]
        files = [split for split in splits if isinstance(split, FileSplit)]
        sizes: dict[str, list[int]] = {}
        for split in files:
            listed = split.sizes.tolist() if split.sizes is not None else [[0, 0]] * len(split)
            sizes |= zip(split.paths, listed, strict=True)
        paths = tuple(sorted(sizes))
        if not paths or len(files) < len(splits):
            return None
        checked = np.array([sizes[path] for path in paths], np.int64)
        no_labels = np.zeros(len(paths), np.int64)
        return cls(replace(files[0], paths=paths, labels=no_labels, sizes=checked), max_side)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def layout(self) -> StoreLayout:
        """Layout of the file; available when all images are checked."""
        assert self.split.sizes is not None
        sizes = [limited_size((w, h), self.max_side) for w, h in self.split.sizes.tolist()]
        return StoreLayout(np.array(sizes, np.int64), self.split.sizes)

    def rows(self, split: FileSplit) -> Labels:
        """Return the numbers in this set of the images of ``split``, (N,) int64."""
        number = {path: row for row, path in enumerate(self.split.paths)}
        return np.array([number[path] for path in split.paths], np.int64)

    def with_key(self) -> ImageSet:
        """Return the set with its key, a hash of the files, the decoder and the settings.

        The times of the files are included, so that an image that is replaced by one of the same
        size is decoded again. Raises OSError if a file is missing.
        """
        decoder = CACHE_FORMAT, __version__, PIL.__version__, features.version("jpg"), self.max_side
        sha = hashlib.sha256(repr(decoder).encode())
        for index, path in enumerate(self.split.paths):
            status = self.split.path(index).stat()
            times = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            sha.update(os.fsencode(path) + b"\0%d %d %d\0" % times)
        return replace(self, key=sha.hexdigest()[:32])
