"""Requests to stop, from signals or a STOP file, that all processes answer at the same step.

Needs no torch before several processes are joined: signals count from a command's first moment.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from job.distributed.cores import given_environ
from job.errors import StopRequest
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
FILE_INTERVAL = 1.0  # seconds between looks for the STOP file: shared storage is slow
NOTHING, SAVE, STOP = range(3)
TOO_EARLY = "stopped by request before it began"


class _Requests:
    """What signals have asked of this process, and whether they may interrupt what it does."""

    asked = False
    interrupts = True


def listen() -> None:
    """Take the four signals as requests to stop; they raise KeyboardInterrupt but in ``deferred``.

    SIGINT too, which a script's background jobs ignore. A second SIGINT always interrupts. One that
    came while this program took another's place interrupts now.
    """
    for number in SIGNALS:
        signal.signal(number, _ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _ask(number: int, _frame: Any) -> None:
    again = _Requests.asked and number == signal.SIGINT
    _Requests.asked = True
    if _Requests.interrupts or again:
        raise KeyboardInterrupt


def requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _Requests.asked


def become(program: list[str]) -> NoReturn:
    """Run ``program`` in place of this one; a request meanwhile waits for its ``listen``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execve(program[0], program, given_environ())


def ignore_requests() -> None:
    """Let no signal disturb a process that is ending already; the launcher may send it one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(number: signal.Signals) -> None:
    """Be sent ``number`` when the thread that started this process ends, however (Linux)."""
    import ctypes

    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


@contextmanager
def _interrupts(value: bool) -> Iterator[None]:
    before, _Requests.interrupts = _Requests.interrupts, value
    try:
        yield
    finally:
        _Requests.interrupts = before


def deferred() -> Any:
    """A context in which a request only sets a flag, for ``Watch`` to find at the next poll."""
    return _interrupts(False)


@contextmanager
def interruptible() -> Iterator[None]:
    """A context within ``deferred`` in which a request, an earlier one too, interrupts."""
    with _interrupts(True):
        if _Requests.asked:
            raise KeyboardInterrupt
        yield


@contextmanager
def answered_at_once(answer: Callable[[int], None]) -> Iterator[None]:
    """Call ``answer`` with each signal's number from a thread, instead of the usual handlers.

    Those run between bytecodes, hence not while torch waits in C++ for other processes.
    """
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)

    def watch() -> None:
        while (number := os.read(read, 1)) != b"\0":
            if number[0] in SIGNALS:
                answer(number[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


def starting() -> Any:
    """A context for imports and for waiting for other processes: a request ends this one at once.

    Nothing is there to be saved yet, and torch's initialisation takes no exception.
    """
    return answered_at_once(leave_now)


def leave_now(_number: int = 0) -> None:
    """End this process, which has nothing to save, from whatever thread."""
    if is_main():
        os.write(2, f"Error: {TOO_EARLY}\n".encode())
    os._exit(StopRequest.exit_code)


class Watch:
    """Whether to stop or to save now. ``poll`` is collective.

    Every process calls it at the same places and gets the same answer.
    """

    def __init__(self, stop_file: Path, save_every: float) -> None:
        self.stop_file, self.save_every = stop_file, save_every
        self._looked = self._saved = time.monotonic()
        self._old = self._identity()

    def follow(self, stop_file: Path) -> None:
        """Look for this file from now on; one that is there now is an earlier request."""
        if stop_file != self.stop_file:
            self.stop_file = stop_file
            self._old = self._identity()

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.stop_file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def forget_old_request(self) -> None:
        """Remove a STOP file that an earlier attempt left; a newer one stays and counts.

        The main process calls it once the run is its own.
        """
        if self._old and self._identity() == self._old:
            with suppress(OSError):
                self.stop_file.unlink(missing_ok=True)

    def saved(self) -> None:
        """Start counting the time to the next save."""
        self._saved = time.monotonic()

    def asked(self) -> bool:
        """Whether this process has been asked to stop, or a new STOP file lies there."""
        now = time.monotonic()
        if not _Requests.asked and now - self._looked >= FILE_INTERVAL:
            self._looked = now
            found = self._identity()
            if found is not None and found != self._old:  # else a signal may have come meanwhile
                _Requests.asked = True
        return _Requests.asked

    def poll(self) -> int:
        """NOTHING, SAVE (``save_every`` seconds have passed) or STOP, the same on every process."""
        from job.distributed.collectives import gloo_group
        from job.processes import is_main, world_size

        stop = self.asked() if is_main() else _Requests.asked
        due = is_main() and time.monotonic() - self._saved >= self.save_every
        answer = STOP if stop else SAVE if due else NOTHING
        if world_size() > 1:
            import torch
            import torch.distributed as dist

            shared = torch.tensor(answer)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=gloo_group())
            answer = int(shared)
        return answer

    def check(self) -> None:
        """Raise StopRequest on every process when somebody has asked to stop; collective."""
        if self.poll() == STOP:
            raise StopRequest("stopped by request")

    def check_here(self) -> None:
        """Raise StopRequest when this process has been asked to stop, as within ``on_main``."""
        if self.asked():
            raise StopRequest("stopped by request")
