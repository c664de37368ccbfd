"""Splits whose images are read from a cache once it is complete, else from their files."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from job.data.splits import FileSplit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from job.data.cache.image_set import ImageSet
    from job.data.cache.store import StoredImages
    from job.data.geometry import Box, Croppable, Size
    from job.data.splits import Labels, Split


@dataclass
class ImageCache:
    """Cache of a job for ``images``; ``stored`` is None until its file is complete."""

    images: ImageSet | None = None
    stored: StoredImages | None = None

    def __getstate__(
        self,
    ) -> dict[str, object]:  # without the list of all images, for loader processes
        return {"images": None, "stored": self.stored}

    def over(self, split: Split) -> Split:
        """Return ``split`` read from this cache; unchanged if its images are not in the set."""
        if self.images is None or not isinstance(split, FileSplit):
            return split
        return CachedSplit(split, self.images.rows(split), self)


class ImageArray(NamedTuple):
    """Images of one size; image i of a split is ``images[rows[i]]``.

    ``images`` are (N, height, width) or (N, height, width, 3) uint8.
    """

    images: NDArray[np.uint8]
    rows: Sequence[int] | Labels


@dataclass(frozen=True)
class CachedSplit:
    """Split with the images of ``files``; image i is number ``rows[i]`` of the ``cache``."""

    files: FileSplit
    rows: Labels
    cache: ImageCache = field(repr=False)

    @property
    def labels(self) -> Labels:  # noqa: D102
        return self.files.labels

    @property
    def lenient(self) -> bool:  # noqa: D102
        return self.files.lenient

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Croppable:  # noqa: D102
        stored, row = self.cache.stored, self.rows[index]
        if stored is None or not stored.has(row):
            return self.files.image(index)
        return CachedImage(stored.pixels(row))

    def array(self, count: int) -> ImageArray | None:
        """Return all images as an array if they have one size; ``count`` of them will be read."""
        stored = self.cache.stored
        images = stored.array(count) if stored else None
        return None if images is None else ImageArray(images, self.rows)

    def name(self, index: int) -> str:  # noqa: D102
        return self.files.name(index)

    def select(self, indices: Labels, labels: Labels | None = None) -> CachedSplit:  # noqa: D102
        return replace(self, files=self.files.select(indices, labels), rows=self.rows[indices])

    def digest(self) -> bytes:  # noqa: D102
        return self.files.digest()


class CachedImage:
    """Image (height, width, 3) in a cache, of which only the requested parts are copied.

    Its methods are equivalent to those of a decoded ``PIL.Image.Image``.
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels: Any = pixels
        self.height, self.width = pixels.shape[:2]

    @property
    def size(self) -> Size:
        """Width and height in pixels."""
        return self.width, self.height

    def crop(self, box: Box) -> Image.Image:
        """Copy the part inside ``box``; pixels outside the image are black."""
        left, top, right, bottom = box
        x, y = max(left, 0), max(top, 0)
        part = self._pixels[y : max(y, bottom), x : max(x, right)]
        if part.shape[:2] == (bottom - top, right - left) and part.size:
            return Image.fromarray(part)
        canvas = Image.new("RGB", (right - left, bottom - top))
        if part.size:
            canvas.paste(Image.fromarray(part), (x - left, y - top))
        return canvas

    def resize(self, size: Size, resample: int) -> Image.Image:
        """Return the image resized to ``size``, as Pillow does with the filter ``resample``."""
        return Image.fromarray(self._pixels).resize(size, resample)
