"""Batches that threads of this process make ahead of the training step.

They cost less than those of loader processes, which are copied between processes, if making them
is numpy's and Pillow's work: both release the lock of Python.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

AHEAD = 2  # batches of a thread that are made before they are asked for


def batches_of_threads(images: Any, sampler: Iterable[Any], threads: int) -> Iterator[Any]:
    """Yield ``images.__getitems__(indices)`` for all ``indices`` of ``sampler``, in order."""
    pool, indices = ThreadPoolExecutor(threads, "gammaslim-loader"), iter(sampler)
    waiting = deque(
        pool.submit(images.__getitems__, some) for some in islice(indices, threads * AHEAD)
    )
    try:
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(images.__getitems__, some) for some in islice(indices, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
