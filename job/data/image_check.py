"""Check of all images before a run: unreadable images are an error or are left out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from job.data.images import check_image, without_warnings
from job.data.splits import ArraySplit, FileSplit
from job.distributed.cores import available_cores
from job.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

    from job.data.dataset import Dataset
    from job.data.geometry import Size

MAX_THREADS = 16


def check_images(
    data: Dataset,
    names: Iterable[str],
    on_bad_image: str,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda results, _: results,
    known: Mapping[str, Size] | None = None,
) -> tuple[Dataset, int]:
    """Decode every image of the splits ``names`` once.

    Returns the data set and the largest side of any image in pixels. An image that cannot be read
    raises DataError if ``on_bad_image`` is ``fail``; if it is ``skip``, the image is left out and
    listed in ``skipped``, and the split becomes lenient. ``progress`` is called with
    the results and their number, and returns an iterable of the results. Images with a ``known``
    (width, height), by path, are not decoded.
    """
    largest = 0
    for name in names:
        split = data.splits[name]
        if isinstance(split, ArraySplit):
            largest = max(largest, *split.images.shape[1:3])
            continue
        assert isinstance(split, FileSplit)
        readable, unreadable, sizes = [], [], []
        with closing(_check_files(split, known or {})) as results:
            for index, result in enumerate(progress(results, len(split))):
                if isinstance(result, DataError):
                    if on_bad_image == "fail":
                        raise DataError(f"{result}; fix or remove it, or pass --on-bad-image skip")
                    unreadable.append(split.name(index))
                else:
                    readable.append(index)
                    sizes.append(result)
                    largest = max(largest, *result)
        if not readable:
            raise DataError(f"no image of the {name} split of {data.root} can be read")
        split = split.select(np.array(readable)) if unreadable else split
        lenient = on_bad_image == "skip"
        split = replace(split, lenient=lenient, sizes=np.array(sizes, np.int64))
        data = replace(data.with_splits(**{name: split}), skipped=(*data.skipped, *unreadable))
    return data, largest


def _check_files(split: FileSplit, known: Mapping[str, Size]) -> Generator[Size | DataError]:
    """Yield the (width, height) of each image, or the error if it cannot be read."""
    if all(path in known for path in split.paths):
        yield from (known[path] for path in split.paths)
        return

    def check(index: int) -> Size | DataError:
        try:
            return check_image(split.path(index))
        except DataError as error:
            return error

    # threads suffice: Pillow releases the interpreter lock while it decodes
    pool = ThreadPoolExecutor(min(MAX_THREADS, available_cores()))
    try:
        with without_warnings():
            yield from pool.map(check, range(len(split)))
    finally:
        pool.shutdown(cancel_futures=True)  # a stop request must not wait for all images
