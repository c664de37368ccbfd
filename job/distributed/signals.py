"""Signals that request a stop, and what one does to this process at present.

A request is SIGTERM, SIGINT, SIGUSR1 or SIGUSR2. What it does depends on the mode:

    Python's own ──listen()──► INTERRUPT ──ignore_requests()──► IGNORED
                                 │
                                 ├─ become() ─────────────► blocked until the program that takes
                                 │                          this one's place calls listen()
                                 ├─ with starting() ──────► IMMEDIATE: end with exit code 75
                                 ├─ with answering(f) ────► IMMEDIATE: a thread calls f
                                 └─ with deferred() ──────► DEFERRED
                                                              └─ with interruptible() ► INTERRUPT

    INTERRUPT  raise KeyboardInterrupt
    DEFERRED   set a flag, which job.distributed.stop polls; a second SIGINT interrupts
    IMMEDIATE  answer from a thread, also while the main thread waits in C++
    IGNORED    do nothing: the process is ending already

A ``with`` block returns to the mode before it. Loads no torch: requests count from a command's
first moment.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from job.distributed.cores import given_environ
from job.errors import StopRequest
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TOO_EARLY = "stopped by request before it began"


class _State:
    """The state of this process: whether a stop is requested, and whether a request interrupts."""

    requested = False
    interrupts = True


def listen() -> None:
    """Take the four signals as requests to stop, from Python's own mode to INTERRUPT.

    SIGINT too, which a script's background jobs ignore. A signal that was blocked by ``become``
    interrupts now.
    """
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _on_signal(number: int, _frame: Any) -> None:
    second_interrupt = _State.requested and number == signal.SIGINT
    request_stop()
    if _State.interrupts or second_interrupt:
        raise KeyboardInterrupt


def request_stop() -> None:
    """Note that this process is requested to stop, as a signal does; interrupts nothing."""
    _State.requested = True


def stop_requested() -> bool:
    """Return whether this process has been requested to stop."""
    return _State.requested


def become(program: list[str]) -> NoReturn:
    """Run ``program`` in place of this one; a request in between waits for its ``listen``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execve(program[0], program, given_environ())


def ignore_requests() -> None:
    """Ignore the four signals: the process is ending, and its launcher may send it one more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(number: signal.Signals) -> None:
    """Receive ``number`` when the thread that started this process ends, for any reason (Linux)."""
    import ctypes

    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


@contextmanager
def _interrupts(value: bool) -> Iterator[None]:
    before, _State.interrupts = _State.interrupts, value
    try:
        yield
    finally:
        _State.interrupts = before


def deferred() -> AbstractContextManager[None]:
    """Return a context in which a request only sets a flag, which the next poll finds."""
    return _interrupts(False)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within ``deferred``, let a request interrupt; one that came earlier interrupts now."""
    with _interrupts(True):
        if _State.requested:
            raise KeyboardInterrupt
        yield


@contextmanager
def answering(answer: Callable[[int], None]) -> Iterator[None]:
    """Call ``answer`` with each signal's number from a thread, in place of Python's handlers.

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


def starting() -> AbstractContextManager[None]:
    """Return a context for imports and for joining other processes: a request ends this process.

    There is nothing to save yet, and torch's initialisation takes no exception.
    """
    return answering(end_before_start)


def end_before_start(_number: int = 0) -> None:
    """End this process, which has nothing to save, from any thread."""
    if is_main():
        os.write(2, f"Error: {TOO_EARLY}\n".encode())
    os._exit(StopRequest.exit_code)
