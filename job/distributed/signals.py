"""Stop requests by signal, and the mode that determines their effect.

SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 request a stop. The effect depends on the mode:

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

A ``with`` block restores the previous mode. This module does not import torch: a command handles
requests from its start.
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
    """Whether a stop of this process is requested, and whether a request interrupts it."""

    requested = False
    interrupts = True


def listen() -> None:
    """Install the handlers of the four signals, in mode INTERRUPT.

    Includes SIGINT, which the background jobs of a script ignore by default. A signal that
    ``become`` blocked interrupts now.
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
    """Request this process to stop, without interrupting it."""
    _State.requested = True


def stop_requested() -> bool:
    """Return whether this process has been requested to stop."""
    return _State.requested


def become(program: list[str]) -> NoReturn:
    """Replace this process by ``program``; requests are blocked until it calls ``listen``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execve(program[0], program, given_environ())


def ignore_requests() -> None:
    """Ignore the four signals: the process is ending and may receive another one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Receive ``number`` when the thread that started this process ends, for any reason (Linux).

    If ``parent``, the id of the process that started this one, has ended before, receive it now.
    """
    import ctypes

    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


@contextmanager
def _interrupts(value: bool) -> Iterator[None]:
    before, _State.interrupts = _State.interrupts, value
    try:
        yield
    finally:
        _State.interrupts = before


def deferred() -> AbstractContextManager[None]:
    """Return a context in which a request only sets a flag, for the next poll."""
    return _interrupts(False)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a request interrupt within ``deferred``; a pending one interrupts immediately."""
    with _interrupts(True):
        if _State.requested:
            raise KeyboardInterrupt
        yield


@contextmanager
def answering(answer: Callable[[int], None]) -> Iterator[None]:
    """Call ``answer`` with the number of each signal, from a thread.

    Python's handlers run between bytecodes, not while torch waits in C++ for other processes.
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
    """Return a context for start-up, in which a request ends this process.

    There is nothing to save yet, and torch's initialisation cannot be interrupted safely.
    """
    return answering(end_before_start)


def end_before_start(_number: int = 0) -> None:
    """Exit immediately, from any thread; there is nothing to save yet."""
    if is_main():
        os.write(2, f"Error: {TOO_EARLY}\n".encode())
    os._exit(StopRequest.exit_code)
