"""User-facing errors, one class an exit code. Each is shown as one line that says what to do."""

from __future__ import annotations

import difflib
import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class GammaslimError(Exception):
    """Base of all errors with a documented exit code; by itself: a failed internal check (1)."""

    exit_code = 1
    reported = False  # another process says it
    late = False  # another process has the reason, and should speak first


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


class OutputClosedError(StorageError):
    """Nobody reads the output of the command, as after ``| head`` (74). It is not reported."""

    reported = True


class StopRequest(GammaslimError):  # noqa: N818
    """Somebody asked the job to stop; its position is saved (75)."""

    exit_code = 75

    def __init__(self, message: str, *, abrupt: bool = False) -> None:
        super().__init__(message)
        self.abrupt = abrupt  # something that would keep the process from ending is left behind


class ConfigError(GammaslimError):
    """An invalid configuration file, or one that does not fit the run it would resume (78)."""

    exit_code = 78


class OtherRunError(ConfigError):
    """The run in a folder was begun with other options, data or weights (78).

    ``difference`` says so without advice.
    """

    def __init__(self, message: str, difference: str = "") -> None:
        super().__init__(message)
        self.difference = difference


def printable(text: str) -> str:
    """``text`` on one line: what a terminal would obey or could not show becomes escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it can be printed anywhere: bytes that are not UTF-8 become escapes."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def reason(error: BaseException) -> str:
    """The first line of what another library says, or the error's name when it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """``; did you mean …?`` with the closest of ``choices``, or "".

    ``cutoff``, from 0 to 1, is the least similarity of a suggestion (difflib's ratio).
    """
    close = difflib.get_close_matches(name, sorted(choices), 1, cutoff)
    return f"; did you mean {close[0]}?" if close else ""


# the storage is to blame, not what it holds: worth another try
_STORAGE = {
    errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO,
    errno.EHOSTDOWN, errno.ENOTCONN, errno.ENOLINK,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT}


def cannot(verb: str, path: str | os.PathLike[str], error: OSError) -> StorageError:
    """The StorageError (74) that names ``path``, what is wrong and what to do."""
    advice = "free some space" if error.errno in _FULL else "fix that"
    why = error.strerror or str(error)
    return StorageError(
        f"cannot {verb} {shown(path)}: {why}; {advice} and run the same command again"
    )


def cannot_begin(path: str | os.PathLike[str], error: OSError) -> GammaslimError:
    """An OutputError (73) that names ``path``; a full or failing disk is a StorageError (74)."""
    if error.errno in _STORAGE | _FULL:
        return cannot("write into", path, error)
    return OutputError(f"cannot write into {shown(path)}: {error.strerror}")


def exit_code(error: BaseException) -> int:
    """The code that a command ends with when ``error`` ends it."""
    if isinstance(error, OSError):
        return StorageError.exit_code
    return getattr(error, "exit_code", 1)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError that the storage of ``path`` is to blame for into a StorageError (74)."""
    try:
        yield
    except OSError as error:
        if error.errno in _STORAGE:
            raise cannot("read", path, error) from error
        raise


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError raised while ``path`` is written into a StorageError (74) that names it."""
    try:
        yield
    except OSError as error:
        raise cannot("write", path, error) from error
