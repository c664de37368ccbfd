"""Files under the URL of an object store (``s3://bucket/runs/a``), read and written by fsspec."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from job.errors import GammaslimError, OutputError, StorageError, UsageError, printable, reason
from job.files import remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "cloud", "gcs": "cloud"}
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
# a server that is silent must not hold the end of a job for long
S3_LIMITS = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}
GCS_LIMITS = {"requests_timeout": 60}
_REFUSALS = {"401", "403"}
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)


def is_store_url(path: str) -> bool:
    """Return whether ``path`` is a URL, e.g. s3://bucket/runs/a."""
    return _URL.fullmatch(path) is not None


def local_scratch() -> Path:
    """Return the folder for local files on this machine: SLURM_TMPDIR, TMPDIR, or /tmp."""
    named = (os.environ.get(name) for name in ("SLURM_TMPDIR", "TMPDIR"))
    return Path(next(filter(None, named), None) or tempfile.gettempdir())


class Store:
    """The files under ``url``, by their names relative to it.

    Raises UsageError for a URL that cannot be used. All methods raise StorageError when the store
    does not respond, and OutputError when it refuses; no message contains a key.
    """

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url)
        assert match
        self.scheme, rest = match[1], match[2]
        place, _, inside = rest.partition("/")
        if "@" in place or "?" in rest or "#" in rest:
            raise UsageError(
                f"a URL of {self.scheme}:// must not contain keys or parameters: give the keys in "
                "the environment or in the files of the provider's own tools"
            )
        if not inside.strip("/"):
            raise UsageError(
                f"{printable(url)} names no folder: give e.g. {self.scheme}://BUCKET/runs/NAME"
            )
        self.url = url.rstrip("/")
        self._on_disk = self.scheme in ("file", "local")
        self._root, self._files = "", None  # connected when first used

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def list(self) -> dict[str, float | None]:
        """Return the times of change of all files in Unix seconds, by name; None if unknown.

        The name is "" if the URL is that of a file.
        """

        def found(files: Any) -> dict[str, float | None]:
            infos = files.find(self._root, detail=True)
            prefix = self._root.rstrip("/") + "/"
            return {path[len(prefix) :]: _changed(info) for path, info in sorted(infos.items())}

        try:
            return dict(self._call(found))
        except FileNotFoundError as error:
            if self.scheme in ("s3", "s3a"):  # the bucket: a folder without files is no error there
                self._refuse(error)
            return {}

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if it does not exist."""
        try:
            return bytes(self._call(lambda files: files.cat_file(self._path(name))))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Replace a file by ``content``."""
        if self._on_disk:
            self._call(lambda _: _replace(Path(self._path(name)), content))
            return
        self._write(lambda files: files.pipe_file(self._path(name), content))

    def get(self, name: str, path: Path) -> None:
        """Copy a file to ``path``, whose folder is made if needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._call(lambda files: files.get_file(self._path(name), str(path)))

    def get_all(self, path: Path) -> None:
        """Copy the whole folder, or the file of this URL, to ``path``; several files at a time."""
        names = self.list()
        if set(names) == {""}:
            self.get("", path)
            return
        path.mkdir(parents=True, exist_ok=True)
        here = [str(path / name) for name in names]
        for parent in {os.path.dirname(name) for name in here}:  # noqa: PTH120
            os.makedirs(parent, exist_ok=True)  # noqa: PTH103
        self._call(lambda files: files.get([self._path(name) for name in names], here))

    def put(self, path: Path, name: str) -> None:
        """Replace a file by the content of ``path``: completely, or not at all."""
        if self._on_disk:
            self._call(lambda _: _replace(Path(self._path(name)), path))
            return
        self._write(lambda files: files.put_file(str(path), self._path(name)))

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, in this order; those that do not exist are skipped."""
        for name in names:
            with suppress(FileNotFoundError):
                self._call(partial(self._remove, name))

    def check_writable(self) -> None:
        """Write and delete a small file."""
        probe = f".gammaslim.{os.getpid()}.tmp"
        self.write(probe, b"?")
        self.delete([probe])

    def reconnect(self) -> None:
        """Read keys and settings again when next used: they may have been renewed."""
        self._files = None

    def _remove(self, name: str, files: Any) -> None:
        files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def _write(self, work: Callable[[Any], object]) -> None:
        try:
            self._call(work)
        except FileNotFoundError as error:  # no such bucket
            self._refuse(error)

    def _call(self, work: Callable[[Any], Any]) -> Any:
        try:
            if self._files is None:
                self._files, self._root = self._connect()
            return work(self._files)
        except (FileNotFoundError, GammaslimError):
            raise
        except Exception as error:  # botocore, aiohttp and google.auth raise classes of their own
            self._refuse(error)

    def _connect(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self.scheme in ("s3", "s3a"):
            options["config_kwargs"] = S3_LIMITS
        if self.scheme in ("gs", "gcs"):
            options |= GCS_LIMITS
            # it logs the errors that it raises, and a warning with each call
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        if self._on_disk or self.scheme == "memory":
            options = {}
        try:
            files, root = url_to_fs(self.url, **options)
        except ImportError as error:
            extra = EXTRAS.get(self.scheme)
            advice = f"pip install 'gammaslim[{extra}]'" if extra else "install its fsspec package"
            raise UsageError(f"{self.scheme}:// needs another package: {advice}") from error
        except ValueError as error:  # fsspec knows no such protocol
            raise UsageError(
                f"{printable(self.scheme)}:// is not known: use s3://, gs:// or file://"
            ) from error
        return files, str(root)

    def _refuse(self, error: Exception) -> NoReturn:
        """Raise OutputError if the store refuses, StorageError if it does not respond."""
        why = printable(reason(error))[:200]
        for secret in filter(None, map(os.environ.get, SECRETS)):
            why = why.replace(secret, "…")
        if isinstance(error, FileNotFoundError) and self.scheme in ("gs", "gcs"):
            why = "the bucket does not exist"  # the error has an address alone
        if _is_refusal(error):
            raise OutputError(
                f"{printable(self.url)} refuses access: {why}; check the bucket, its permissions "
                "and the keys of this job"
            ) from error
        raise StorageError(
            f"{printable(self.url)} does not respond: {why}; run the same command again when it "
            "does"
        ) from error


def _is_refusal(error: Exception) -> bool:
    """Return whether an error of s3fs, gcsfs or their libraries means that access is refused."""
    if isinstance(error, PermissionError | FileNotFoundError):
        return True
    words = f"{type(error).__name__} {error}".lower()
    named = ("credential", "forbidden", "refresherror")  # gcsfs's 403; google.auth's invalid key
    return str(getattr(error, "code", "")) in _REFUSALS or any(name in words for name in named)


def _changed(info: Mapping[str, Any]) -> float | None:
    """Return when a file changed, from the fields of S3, of disks, and of other stores."""
    time = next((info[key] for key in ("LastModified", "mtime", "updated") if key in info), None)
    if isinstance(time, str):
        with suppress(ValueError):
            time = datetime.fromisoformat(time)
    if isinstance(time, datetime):
        return time.timestamp()
    return float(time) if isinstance(time, int | float) else None


def _replace(target: Path, source: Path | bytes) -> None:
    """Replace a file on a disk, e.g. a mounted bucket, by a file or by bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _copy(source, temporary)
        temporary.replace(target)
    except OSError as error:
        remove(temporary)
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        _copy(source, target)  # a bucket mounted without renaming shows complete files only


def _copy(source: Path | bytes, target: Path) -> None:
    if isinstance(source, bytes):
        target.write_bytes(source)
    else:
        shutil.copyfile(source, target)
