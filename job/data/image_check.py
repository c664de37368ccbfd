"""From folders to batches: layout -> samples -> checked images -> augmented batches."""

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
    from collections.abc import Callable, Generator, Iterable

    from job.data.dataset import Dataset


def check_images(
    data: Dataset,
    names: Iterable[str],
    on_bad_image: str,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda results, _: results,
) -> tuple[Dataset, int]:
    """Read every image of the splits ``names`` once; returns the data set and its largest side.

    An image that cannot be read raises DataError (``fail``) or is left out and listed in
    ``skipped`` (``skip``).
    """
    largest = 0
    for name in names:
        split = data.splits[name]
        if isinstance(split, ArraySplit):
            largest = max(largest, *split.images.shape[1:3])
            continue
        assert isinstance(split, FileSplit)
        good, bad = [], []
        with closing(_checked(split)) as results:
            for index, result in enumerate(progress(results, len(split))):
                if isinstance(result, DataError):
                    if on_bad_image == "fail":
                        raise DataError(f"{result}; fix or remove it, or pass --on-bad-image skip")
                    bad.append(split.name(index))
                else:
                    good.append(index)
                    largest = max(largest, *result)
        if on_bad_image == "skip":
            data = data.with_splits(**{name: replace(split, lenient=True)})
        if not good:
            raise DataError(f"no image of the {name} split of {data.root} can be read")
        if bad:
            data = replace(
                data.with_splits(**{name: data.splits[name].select(np.array(good))}),
                skipped=(*data.skipped, *bad),
            )
    return data, largest


def _checked(split: FileSplit) -> Generator[tuple[int, int] | DataError]:
    def check(index: int) -> tuple[int, int] | DataError:
        try:
            return check_image(split.path(index))
        except DataError as error:
            return error

    # threads do: Pillow decodes outside the interpreter lock
    pool = ThreadPoolExecutor(min(16, available_cores()))
    try:
        with without_warnings():
            yield from pool.map(check, range(len(split)))
    finally:
        pool.shutdown(cancel_futures=True)  # a stop request must not wait for all images
