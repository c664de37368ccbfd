"""Decoding of a share of the images of a cache, by threads, in slices of time."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from job.data.augmentation import limit_side
from job.data.image_check import MAX_THREADS
from job.data.images import one_big, without_warnings
from job.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future

    from job.data.cache.image_set import ImageSet
    from job.data.cache.store import StoreWriter


class ShareBuilder:
    """Builder that decodes the images ``rows`` of a set into a file, by ``threads`` threads."""

    def __init__(
        self, images: ImageSet, writer: StoreWriter, rows: Iterable[int], threads: int
    ) -> None:
        self.images, self.writer, self.rows = images, writer, iter(rows)
        self.done, self.finished = 0, False
        self.missing: list[int] = []  # images that cannot be decoded now
        self._threads = max(1, min(MAX_THREADS, threads))
        self._pool = ThreadPoolExecutor(self._threads)
        self._running: deque[Future[int | None]] = deque()

    def work(self, seconds: float) -> None:
        """Decode for about ``seconds``; raises StorageError."""
        end = time.monotonic() + seconds
        with without_warnings():
            while not self.finished and time.monotonic() < end:
                self._submit()
                if not self._running:
                    self.finished = True
                elif (missing := self._running.popleft().result()) is not None:
                    self.missing.append(missing)
                self.done += not self.finished

    def _submit(self) -> None:
        """Keep a few images per thread in progress; futures of all images would fill the memory."""
        while len(self._running) < 4 * self._threads:
            row = next(self.rows, None)
            if row is None:
                return
            self._running.append(self._pool.submit(self._decode, row))

    def _decode(self, row: int) -> int | None:
        """Decode one image into the file; return its number if that fails."""
        split, sizes = self.images.split, self.images.split.sizes
        assert sizes is not None
        try:
            with one_big(int(sizes[row].prod())):
                image = limit_side(split.image(row), self.images.max_side)
                pixels = np.asarray(image)
            self.writer.write(row, pixels)
        except DataError:  # training reports or replaces the image when it reads it
            return row
        return None

    def close(self) -> None:
        """End the threads, and close the file."""
        self._pool.shutdown(cancel_futures=True)
        self.writer.close()
