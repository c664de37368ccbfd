"""Masks of semantic segmentation: images whose pixels are class numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from job.distributed.cores import available_cores
from job.errors import DataError, reason, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from job.data.splits import FileSplit

CLASSES_FILE = "classes.txt"  # a name a line, in the order of the numbers
IGNORED = 255  # pixels without a class


def read_mask(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the values (H, W) uint8 of a mask; raises DataError for an image of colours."""
    try:
        with Image.open(path) as image:
            values = np.array(image)
    except Exception as error:  # Pillow raises nearly anything on a corrupt file
        raise DataError(f"{shown(path)} cannot be read as a mask: {reason(error)}") from error
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.ndim == 3 and (values == values[..., :1])[..., :3].all():
        values = values[..., 0]
    if values.ndim != 2:
        raise DataError(
            f"{shown(path)} has colours: the value of a pixel of a mask is the number of its class "
            f"(grey or palette PNG), or {IGNORED} without one"
        )
    if values.max(initial=0) > IGNORED:
        raise DataError(f"{shown(path)} has the class {values.max()}: at most {IGNORED - 1}")
    return values.astype(np.uint8)


def numbered_mask(
    mask: np.ndarray[Any, np.dtype[np.uint8]], values: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a mask of class numbers; masks of 0 and 255 alone have two classes."""
    return (mask // 255).astype(np.uint8) if values == (0, 255) else mask


def find_values(
    root: Path, splits: Mapping[str, FileSplit], masks: Mapping[str, str]
) -> dict[int, str]:
    """Return the values of all masks, sorted, and for each the first mask that shows it.

    Raises DataError if the size of a mask is not that of its image.
    """

    def check(job: tuple[str, tuple[int, int]]) -> list[int]:
        path, size = job
        mask = read_mask(root / masks[path])
        if mask.shape[::-1] != size:
            raise DataError(
                f"{shown(root / masks[path])} has {mask.shape[1]} x {mask.shape[0]} pixels, its "
                f"image {size[0]} x {size[1]}"
            )
        found: list[int] = np.unique(mask).tolist()
        return found

    jobs = []
    for split in splits.values():
        sizes = [] if split.sizes is None else split.sizes.tolist()
        jobs += [(path, (w, h)) for path, (w, h) in zip(split.paths, sizes, strict=False)]
    first: dict[int, str] = {}
    with ThreadPoolExecutor(min(16, available_cores())) as pool:
        for (path, _), values in zip(jobs, pool.map(check, jobs), strict=True):
            for value in values:
                first.setdefault(value, masks[path])
    return dict(sorted(first.items()))


def names_of_values(root: Path, values: Mapping[int, str]) -> tuple[tuple[str, ...], str | None]:
    """Return the names of classes.txt, else the numbers, and a caution about a gap before the last.

    ``values`` are those of all masks, sorted, each with a mask that shows it. Raises DataError for
    too few names.
    """
    used = {value: path for value, path in values.items() if value != IGNORED}
    if tuple(values) == (0, IGNORED):
        used = {0: values[0], 1: values[IGNORED]}
    *lower, highest = used or [0]
    file = root / CLASSES_FILE
    if file.is_file():
        lines = file.read_text("utf-8-sig").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
        if len(names) <= highest:
            where = shown(root / used.get(highest, ""))
            raise DataError(
                f"{shown(file)} names {len(names)} classes, but {where} has class {highest}"
            )
        return names, None
    caution = None
    if lower and highest - lower[-1] > 1:
        caution = (
            f"no mask has a class between {lower[-1]} and {highest}, which is in "
            f"{shown(root / used[highest])}: mend it if that is a mistake, else name the classes "
            f"in {CLASSES_FILE}"
        )
    return tuple(map(str, range(highest + 1))), caution
