"""Stop requests, by signal or STOP file, that all processes handle at the same step."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from job.distributed.collectives import gloo_group
from job.distributed.signals import request_stop, stop_requested
from job.errors import StopRequest
from job.processes import is_main, world_size

if TYPE_CHECKING:
    from pathlib import Path

FILE_INTERVAL = 1.0  # seconds between checks for the STOP file: shared storage is slow
NOTHING, SAVE, STOP = range(3)


class Watch:
    """Decides when to stop and when to save. ``poll`` is collective.

    Every process calls it at the same points and gets the same answer.
    """

    def __init__(self, stop_file: Path, save_every: float) -> None:
        self.stop_file, self.save_every = stop_file, save_every
        self._looked = self._saved = time.monotonic()
        self._old = self._identity()

    def follow(self, stop_file: Path) -> None:
        """Watch ``stop_file`` from now on; a file that exists already is an old request."""
        if stop_file != self.stop_file:
            self.stop_file = stop_file
            self._old = self._identity()

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = self.stop_file.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def forget_old_request(self) -> None:
        """Remove the STOP file of an earlier attempt; a newer one is kept and counts.

        The main process calls this once it holds the run's lock.
        """
        if self._old and self._identity() == self._old:
            with suppress(OSError):
                self.stop_file.unlink(missing_ok=True)

    def saved(self) -> None:
        """Restart the interval until the next save."""
        self._saved = time.monotonic()

    def requested_here(self) -> bool:
        """Return whether this process was requested to stop, or a new STOP file exists."""
        now = time.monotonic()
        if not stop_requested() and now - self._looked >= FILE_INTERVAL:
            self._looked = now
            identity = self._identity()
            if identity is not None and identity != self._old:
                request_stop()
        return stop_requested()  # a signal may have arrived meanwhile

    def poll(self) -> int:
        """Return NOTHING, SAVE (``save_every`` seconds have passed) or STOP, on every process."""
        stop = self.requested_here() if is_main() else stop_requested()
        due = is_main() and time.monotonic() - self._saved >= self.save_every
        answer = STOP if stop else SAVE if due else NOTHING
        if world_size() > 1:
            shared = torch.tensor(answer)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=gloo_group())
            answer = int(shared)
        return answer

    def check(self) -> None:
        """Raise StopRequest on every process when a stop is requested; collective."""
        if self.poll() == STOP:
            raise StopRequest("stopped by request")

    def check_here(self) -> None:
        """Raise StopRequest when this process was requested to stop, e.g. within ``on_main``."""
        if self.requested_here():
            raise StopRequest("stopped by request")
