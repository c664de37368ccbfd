"""The process of a node that finds, locks, creates and completes the file of the cache."""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from job.console import amount, counted, say
from job.data.cache.place import (
    UNUSED,
    cache_folders,
    choose_place,
    mark_used,
    prepare_folder,
    remove_unused,
)
from job.data.cache.store import StoredImages, StoreWriter, publish
from job.errors import GammaslimError, StorageError, cannot_begin
from job.files import remove

if TYPE_CHECKING:
    from job.config import CacheMode
    from job.data.cache.image_set import ImageSet

_memory: list[int] = []  # open files in memory, which last as long as this process


@dataclass(frozen=True)
class CacheOptions:
    """``--cache``, ``--cache-dir`` and the run folder."""

    mode: CacheMode
    cache_dir: str | None
    run: Path

    def find(self, key: str) -> StoredImages | None:
        """Return the finished cache of ``key`` that this node can read, or None."""
        for folder in cache_folders(self.mode, self.cache_dir, self.run):
            if stored := StoredImages.open(folder / f"{key}.images", key):
                return stored
        return None


@dataclass(frozen=True)
class News:
    """What the processes of a node do now: build the file at ``path``, wait for another job, …"""

    state: Literal["build", "wait", "ready", "off"]
    path: Path | None = None
    reason: str = ""  # why there is no cache
    error: tuple[type[GammaslimError], str] | None = None
    found: bool = False  # whether the file was there before this job


class Leader:
    """Finds, locks, creates and completes the file of one node."""

    def __init__(self, images: ImageSet, options: CacheOptions) -> None:
        self.images, self.options = images, options
        self._news: News | None = None  # once it is final
        self._lock: int | None = None
        self._temporary: Path | None = None
        self._final: Path | None = None

    def look(self) -> News:
        """Find the cache, or begin to build it if no other job does."""
        if self._news is None:
            try:
                return self._look()
            except (GammaslimError, OSError) as error:
                self.fail(error)
        assert self._news
        return self._news

    def _look(self) -> News:
        if stored := self.options.find(self.images.key):
            mark_used(stored.path)
            self._news = News("ready", stored.path, found=True)
            return self._news
        options, needed = self.options, self.images.layout.length
        place = choose_place(options.mode, options.cache_dir, options.run, needed)
        if place.folder:
            return self._begin(place.folder)
        if place.memory:
            file = os.memfd_create("gammaslim-cache")
            _memory.append(file)
            self._temporary = Path(f"/proc/{os.getpid()}/fd/{file}")
            return News("build", self._temporary)
        self._news = News("off", reason=place.reason)
        return self._news

    def _begin(self, folder: Path) -> News:
        """Acquire the lock and create a temporary file; wait if another job holds the lock."""
        key = self.images.key
        try:
            prepare_folder(folder)
            count, size = remove_unused(folder)
            if count:
                unused = f"{counted(count, 'file')} unused for {UNUSED} days"
                say(f"cache: {unused}, {amount(size)}, deleted")
            if self._lock is None:
                self._lock = os.open(folder / f".{key}.lock", os.O_RDWR | os.O_CREAT, 0o666)
            if not _locked(self._lock):
                return News("wait")
            if stored := self.options.find(key):  # it was completed meanwhile
                self._news = News("ready", stored.path, found=True)
                return self._news
            for left in folder.glob(f".{key}.*.tmp"):  # of a killed job: nobody holds the lock
                remove(left)
            name = f".{key}.{socket.gethostname()}.{os.getpid()}.tmp"
            self._temporary, self._final = folder / name, folder / f"{key}.images"
            self._temporary.touch()
        except OSError as error:
            raise cannot_begin(folder, error) from error
        return News("build", self._temporary)

    def finish(self, writer: StoreWriter, missing: list[int]) -> None:
        """Complete the file and give it its final name."""
        try:
            writer.finish(self.images.key, missing)
            if self._final and self._temporary:
                publish(self._temporary, self._final)
            self._news = News("ready", self._final or self._temporary)
        except StorageError as error:
            self.fail(error)

    def fail(self, error: GammaslimError | OSError) -> None:
        """Give up: ``auto`` continues without a cache, the other modes end the job."""
        kind = type(error) if isinstance(error, GammaslimError) else StorageError
        automatic = self.options.mode == "auto"
        self._news = News("off", reason=str(error), error=None if automatic else (kind, str(error)))
        self.close()

    def close(self) -> None:
        """Remove what is not complete, and release the lock."""
        complete = self._news is not None and self._news.state == "ready"
        if self._temporary and not complete:
            if self._final:
                remove(self._temporary)
            elif _memory:
                os.close(_memory.pop())
            self._temporary = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(file: int) -> bool:
    """Acquire a lock that ends with this process; True where the storage has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # two builders then write two temporary files, and one replaces the other
        return True
    return True
