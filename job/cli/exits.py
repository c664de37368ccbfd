"""How a process of the job ends: in order, but without finalizing the Python interpreter.

gloo's threads release the last tensors of a collective after it has returned, and need the
interpreter's lock for that. A thread that asks for the lock while the interpreter is finalized is
ended by unwinding (CPython before 3.14), and a C++ destructor on its stack turns that into
std::terminate, "terminate called without an active exception": a finished job ends with SIGABRT.
Destroying the process group does not join these threads as long as anything holds the group.
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
    """Run ``program``, then the exit functions, and end the process with the program's code."""
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
    """End the process with ``code`` once its output is written; exit functions are not run."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1
