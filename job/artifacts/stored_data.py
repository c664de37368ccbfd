"""Data sets in an object store, copied to local scratch once per machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
from typing import TYPE_CHECKING

from job.artifacts.object_store import Store, is_store_url, local_scratch
from job.artifacts.stored_places import note_place
from job.console import counted, say
from job.errors import InputNotFound, OutputError, StorageError, shown, writing
from job.files import remove

if TYPE_CHECKING:
    from pathlib import Path


def local_data(path: str | None) -> str | None:
    """Return ``path``, or for a URL a local copy of the folder or file there.

    The processes of a machine share one copy, in SLURM_TMPDIR or TMPDIR. Later jobs find it as long
    as the store has the same files, by names and times of change. Raises InputNotFound when there
    is nothing or access is refused, StorageError, or UsageError.
    """
    if path is None or not is_store_url(path):
        return path
    store = Store(path)
    try:
        names = store.list()
    except OutputError as error:
        raise InputNotFound(f"--data {error}") from error
    if not names:
        raise InputNotFound(f"--data {store.url} holds no files")
    key = hashlib.sha256(repr((store.url, sorted(names.items()))).encode()).hexdigest()[:16]
    base = local_scratch()
    folder = base / f"gammaslim-data-{os.getuid()}"
    copy = folder / key / store.name
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise StorageError(f"{shown(folder)} belongs to another user: set TMPDIR")
        with (folder / f"{key}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when this process ends, for any reason
            if not copy.exists():
                _download(store, copy, len(names))
    note_place(copy, store.url)
    return str(copy)


def _download(store: Store, copy: Path, count: int) -> None:
    say(f"copying {counted(count, 'file')} of {store.url} to {shown(copy)}")
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    for left in copy.parent.glob(".*.tmp") if copy.parent.is_dir() else ():
        remove(left)  # of a job that was killed here; the lock is held
    store.get_all(temporary)
    temporary.rename(copy)
