"""Errors with a documented exit code, and functions that compose messages.

An error is printed as one line that says what is wrong, where, and what to do.
"""

from __future__ import annotations

import difflib
import errno
import os
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class GammaslimError(Exception):
    """Base of all errors with a documented exit code. Raised directly, it is a failed check (1)."""

    exit_code = 1
    reported = False  # if True, it is not printed: another process prints it, or nobody reads it
    late = False  # if True, another process caused it and should print its own error first


class WrongCutError(GammaslimError):
    """A narrow network that differs from the wide one, does not run, or does not train (1)."""


class UsageError(GammaslimError):
    """Options that contradict each other, or do not fit the network (2)."""

    exit_code = 2


class DataError(GammaslimError):
    """Bad data or weights: corrupt, of a wrong shape, or of unknown classes (65)."""

    exit_code = 65


class InputNotFound(GammaslimError):  # noqa: N818  (the name is the exit code's)
    """An input path that does not exist (66)."""

    exit_code = 66


class OutputError(GammaslimError):
    """The output cannot be created (73)."""

    exit_code = 73


class StorageError(GammaslimError):
    """An I/O error while running, e.g. a full disk or a stale handle (74)."""

    exit_code = 74


class OutputClosedError(StorageError):
    """Nobody reads the output of the command, e.g. after ``| head`` (74). No message is printed."""

    reported = True


class StopRequest(GammaslimError):  # noqa: N818
    """The job was asked to stop, and its position is saved (75).

    ``abrupt``: work was interrupted that would keep the process from ending.
    """

    exit_code = 75

    def __init__(self, message: str, *, abrupt: bool = False) -> None:
        super().__init__(message)
        self.abrupt = abrupt


class ConfigError(GammaslimError):
    """An invalid configuration, or one that does not fit the run to resume (78)."""

    exit_code = 78


class OtherRunError(ConfigError):
    """The run in a folder was started with other options, data or weights (78).

    ``difference`` is the message without advice.
    """

    def __init__(self, message: str, difference: str = "") -> None:
        super().__init__(message)
        self.difference = difference


def printable(text: str) -> str:
    """Return ``text`` on one line, with escapes for control and other unprintable characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fitted(line: str, columns: int) -> str:
    """Return the facts of a line, separated by two spaces, that ``columns`` have space for."""
    line = printable(line)
    end = len(line) if len(line) <= columns else line.rfind("  ", 0, columns + 2)
    return line[: end if end > 0 else columns]


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path that can be printed anywhere, with escapes for bytes that are not UTF-8."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def reason(error: BaseException) -> str:
    """Return the first line of another library's message, or the type of an error without one."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory, of the host or of a GPU, was short, as ``error`` or its cause says."""
    words = ("MemoryError", "OutOfMemoryError")
    return (
        type(error).__name__ in words
        or "t allocate memory" in str(error)
        or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
    )


def describe_error(error: BaseException) -> str:
    """Return one line about ``error``: its message, after the type unless it is written for users.

    It is cut after 300 characters.
    """
    kind = "" if isinstance(error, GammaslimError) else f"{type(error).__name__}: "
    return printable(f"{kind}{reason(error)}")[:300]


def did_you_mean(
    name: str, choices: Iterable[str], cutoff: float = 0.5, *, prefix: str = ""
) -> str:
    """Return ``; did you mean …?`` with the closest of ``choices``, or ""; see `closest`."""
    close = closest(name, choices, cutoff, prefix=prefix)
    return f"; did you mean {close}?" if close else ""


def closest(name: str, choices: Iterable[str], cutoff: float, *, prefix: str = "") -> str | None:
    """Return the closest of ``choices``, or None if all differ too much from ``name``.

    ``cutoff``, from 0 to 1, is the least similarity (difflib's ratio) after a common ``prefix``.
    """
    endings = sorted(choice.removeprefix(prefix) for choice in choices)
    close = difflib.get_close_matches(name.removeprefix(prefix), endings, 1, cutoff)
    return prefix + close[0] if close else None


# failures of the storage, not of its content: another attempt may succeed
_STORAGE = {
    errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO,
    errno.EHOSTDOWN, errno.ENOTCONN, errno.ENOLINK,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT}


def cannot(verb: str, path: str | os.PathLike[str], error: OSError) -> StorageError:
    """Return a StorageError (74) that names ``path``, what is wrong and what to do."""
    advice = "free some space" if error.errno in _FULL else "fix the storage"
    why = error.strerror or str(error)
    return StorageError(
        f"cannot {verb} {shown(path)}: {why}; {advice} and run the same command again"
    )


def cannot_begin(path: str | os.PathLike[str], error: OSError) -> GammaslimError:
    """Return an OutputError (73) that names ``path``, or a StorageError (74) for a failing disk."""
    if error.errno in _STORAGE | _FULL:
        return cannot("write into", path, error)
    return OutputError(f"cannot write into {shown(path)}: {error.strerror}")


def located(error: BaseException) -> str:
    """Return an error in one line, with the last line of code outside of installed packages."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and "/job/" not in frame.filename
    ]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {reason(error)}{place}"


def item_error(where: str, error: Exception) -> DataError | StorageError:
    """Return the error of an item of a user's data that cannot be read; 74 for a failing disk."""
    kind: type[DataError | StorageError] = DataError
    if isinstance(error, OSError) and error.errno in _STORAGE | _FULL:
        kind = StorageError
    return kind(f"{where} cannot be read: {located(error)}")


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ``error`` ends."""
    if isinstance(error, OSError):
        return StorageError.exit_code
    return getattr(error, "exit_code", 1)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError that the storage of ``path`` causes into a StorageError (74)."""
    try:
        yield
    except OSError as error:
        if error.errno in _STORAGE:
            raise cannot("read", path, error) from error
        raise


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError while ``path`` is written into a StorageError (74) that names it."""
    try:
        yield
    except OSError as error:
        raise cannot("write", path, error) from error
