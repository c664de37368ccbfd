"""User-facing errors, one class an exit code. Each is shown as one line that says what to do."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class GammaslimError(Exception):
    """Base of all errors with a documented exit code; by itself: a failed internal check (1)."""

    exit_code = 1


class UsageError(GammaslimError):
    """Options that contradict each other or the network (2)."""

    exit_code = 2


class DataError(GammaslimError):
    """Bad data or weights: corrupt, wrong shape, no such class (65)."""

    exit_code = 65


class InputNotFound(GammaslimError):  # noqa: N818  (the name is the exit code's)
    """An input path that does not exist (66)."""

    exit_code = 66


class OutputError(GammaslimError):
    """The output cannot be written at all (73)."""

    exit_code = 73


class StorageError(GammaslimError):
    """An I/O error while running: full disk, stale handle (74)."""

    exit_code = 74


class StopRequest(GammaslimError):  # noqa: N818
    """Somebody asked the job to stop; its position is saved (75)."""

    exit_code = 75


class ConfigError(GammaslimError):
    """An invalid configuration file, or one that does not fit the run it would resume (78)."""

    exit_code = 78


def printable(text: str) -> str:
    """``text`` on one line: what a terminal would obey or could not show becomes escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it can be printed anywhere: bytes that are not UTF-8 become escapes."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def reason(error: BaseException) -> str:
    """The first line of what another library says, or the error's name when it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError raised while ``path`` is written into a StorageError (74) that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise StorageError(
            f"cannot write {shown(path)}: {reason}; {advice} and run the same command again"
        ) from error
