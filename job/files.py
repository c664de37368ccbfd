"""Reading of files of bounded size, and atomic writing.

A file is written under a temporary name in the same folder, flushed (fsync), renamed, and the
folder is flushed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import stat
import tomllib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

from job.errors import OutputError, cannot_begin, reading, shown, writing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

JsonObject = dict[str, object]  # values to write, or to check after reading JSON or TOML


class Readable(Protocol):
    """A path of a file on disk or in an archive."""

    def __fspath__(self) -> str: ...

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """Open the file to read bytes."""


MAX_BYTES = 64 << 20  # far more than any configuration, model card or history of epochs
_LEFT = re.compile(r"\.(.+)\.\d+\.(tmp|old)")


def shell_word(path: str) -> str:
    """Return a path as one word of a shell command."""
    return shlex.quote(shown(path))


def sync_path(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a file; raises StorageError when the storage does not respond.

    Path.is_file may return False then (Python 3.14), and a run would overwrite its own files.
    """
    with reading(path):
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno == errno.ELOOP:  # a circle of links
                return False
            raise


def read_bytes(path: Readable) -> bytes:
    """Return the content of ``path``; raises StorageError, OSError, or ValueError above 64 MiB."""
    with reading(path), path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    return content


def read_json(path: Path) -> Any:
    """Return the value in ``path``; raises OSError, or ValueError if it is not JSON in UTF-8."""
    try:
        return json.loads(read_bytes(path).decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str) -> JsonObject:
    """Return the tables of ``text``; raises ValueError if it is not TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def toml_text(tables: Mapping[str, Mapping[str, object]]) -> str:
    """Format tables of strings, numbers, booleans and lists of strings as TOML."""
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    text = shown(str(value)).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in text) + '"'


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` atomically; raises StorageError."""
    temporary = _temporary(path, "tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            remove(temporary)
            raise
        sync_path(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Append ``line`` to ``path``, or leave the file as it is and raise StorageError."""
    with writing(path):
        size = path.stat().st_size if is_file(path) else 0
        try:
            with path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.truncate(path, size)  # a full disk may have taken half of the line
            raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``path`` when the block ends without an error.

    Raises StorageError.
    """
    temporary = _temporary(path, "tmp")
    with writing(path):
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_path(path.parent.parent)
        remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                sync_path(file)
            sync_path(temporary)
            _replace_folder(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        sync_path(path.parent)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``; an existing folder is renamed first, and removed last.

    A folder cannot be replaced in one step. If the process is killed between the two renames,
    ``tidy`` restores the old folder.
    """
    old = _temporary(path, "old")
    if os.path.lexists(path):
        path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            old.rename(path)
        raise
    remove(old)


def discard(path: Path) -> None:
    """Rename a folder, then remove it, so that a partly removed one never counts as damaged.

    A folder that cannot be removed stays.
    """
    temporary = _temporary(path, "tmp")
    with suppress(OSError):
        path.rename(temporary)
    remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a folder as far as possible."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove temporary files of a killed attempt from ``folder``; raises StorageError.

    A folder that was set aside and not replaced is restored.
    """
    if not folder.is_dir():
        return
    with writing(folder):
        for left in list(folder.iterdir()):
            match = _LEFT.fullmatch(left.name)
            if match and match[2] == "old" and not os.path.lexists(folder / match[1]):
                left.rename(folder / match[1])
            elif match:
                remove(left)


def check_writable(path: Path) -> None:
    """Raise OutputError unless ``path`` is, or could become, a folder that files can be written to.

    Raises StorageError if the disk is full or failing.
    """
    existing = path
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        probe = existing / f".gammaslim.{os.getpid()}.tmp"
        if not existing.is_dir():
            raise NotADirectoryError(20, "it is not a folder")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_begin(existing, error) from error


def check_output(path: Path) -> Path:
    """Return the file that ``--output`` names, with links resolved so that a link is not replaced.

    Raises OutputError or StorageError if it cannot be written, before any work is done.
    """
    if path.is_dir():
        raise OutputError(f"--output {shown(path)} is a folder: give the name of a file")
    path = Path(os.path.realpath(path))
    if not _is_special(path):
        check_writable(path.parent)
    return path


def write_output(path: Path, content: bytes) -> None:
    """Write the file that ``--output`` names; raises OutputError or StorageError."""
    path = check_output(path)
    with writing(path):
        if _is_special(path):
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def _is_special(path: Path) -> bool:
    """Return whether ``path`` is a pipe or a device, which a file must not replace."""
    return path.exists() and not path.is_file()


def _temporary(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")
