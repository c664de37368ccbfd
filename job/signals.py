"""Requests to stop, from signals or a STOP file, that all processes answer at the same step."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from job.errors import StopRequest
from job.processes import is_main, world

if TYPE_CHECKING:
    from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
FILE_INTERVAL = 1.0  # seconds between looks for the STOP file: shared storage is slow
NOTHING, SAVE, STOP = range(3)


class Watch:
    """Whether to stop or to save now; a context in which signals ask instead of killing.

    A second SIGINT stops at once. ``poll`` is collective: every process calls it at the same
    places and gets the same answer.
    """

    def __init__(self, stop_file: Path, save_every: float) -> None:
        self.stop_file, self.save_every = stop_file, save_every
        self.requested = False
        self._handlers: dict[int, Any] = {}
        self._looked = self._saved = time.monotonic()
        self._group: Any = None

    def __enter__(self) -> Watch:
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._ask)
        if world() > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # no GPU need wait for this
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def forget_old_request(self) -> None:
        """Remove a STOP file that an earlier attempt left; the main process calls it at start."""
        with suppress(OSError):
            self.stop_file.unlink(missing_ok=True)

    def saved(self) -> None:
        """Start counting the time to the next save."""
        self._saved = time.monotonic()

    def poll(self) -> int:
        """NOTHING, SAVE (``save_every`` seconds have passed) or STOP, the same on every process."""
        answer = STOP if self.requested else NOTHING
        now = time.monotonic()
        if is_main() and answer == NOTHING:
            if now - self._looked >= FILE_INTERVAL:
                self._looked = now
                self.requested = self.stop_file.exists()
            due = now - self._saved >= self.save_every
            answer = STOP if self.requested else SAVE if due else NOTHING
        if world() > 1:
            shared = torch.tensor(answer)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
            answer = int(shared)
        return answer

    def check(self) -> None:
        """Raise StopRequest on every process when somebody has asked to stop."""
        if self.poll() == STOP:
            raise StopRequest("stopped by request")
