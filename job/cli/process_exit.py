"""End a process after its exit functions, without finalizing the Python interpreter.

gloo's threads release the last tensors of a collective after it has returned, and need the GIL for
that. CPython before 3.14 unwinds a thread that asks for the GIL during finalization, and a C++
destructor on its stack turns that into std::terminate: a finished job would end with SIGABRT
("terminate called without an active exception"). Destroying the process group does not join these
threads as long as anything refers to the group.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable


def run_and_exit(program: Callable[[], object]) -> NoReturn:
    """Run ``program`` and the exit functions, then end the process with the program's exit code."""
    code = 0
    try:
        program()
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException:  # a bug
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """Flush the output, then end the process with ``code`` without running exit functions."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1
