"""Leader of a node: the process that finds, locks, creates and completes its cache file."""

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
    """Values of ``--cache`` and ``--cache-dir``, and the run folder."""

    mode: CacheMode
    cache_dir: str | None
    run: Path

    def find(self, key: str) -> StoredImages | None:
        """Return the complete cache of ``key`` that this node can read, or None."""
        for folder in cache_folders(self.mode, self.cache_dir, self.run):
            if stored := StoredImages.open(folder / f"{key}.images", key):
                return stored
        return None


@dataclass(frozen=True)
class NodeStep:
    """Next step of the processes of a node: build the file at ``path``, wait for another job, or
    continue with the file (ready) or without one (off).
    """

    state: Literal["build", "wait", "ready", "off"]
    path: Path | None = None
    reason: str = ""  # why there is no cache
    error: tuple[type[GammaslimError], str] | None = None
    found: bool = False  # whether the file existed before this job


class Leader:
    """Finds, locks, creates and completes the cache file of one node."""

    def __init__(self, images: ImageSet, options: CacheOptions) -> None:
        self.images, self.options = images, options
        self._final_step: NodeStep | None = None  # None until it is decided
        self._lock: int | None = None
        self._temporary: Path | None = None
        self._final: Path | None = None

    def next_step(self) -> NodeStep:
        """Find the cache, or begin to build it if no other job does."""
        if self._final_step is None:
            try:
                return self._find_or_begin()
            except (GammaslimError, OSError) as error:
                self.fail(error)
        assert self._final_step
        return self._final_step

    def _find_or_begin(self) -> NodeStep:
        if stored := self.options.find(self.images.key):
            mark_used(stored.path)
            self._final_step = NodeStep("ready", stored.path, found=True)
            return self._final_step
        options, needed = self.options, self.images.layout.length
        place = choose_place(options.mode, options.cache_dir, options.run, needed)
        if place.folder:
            return self._begin(place.folder)
        if place.memory:
            file = os.memfd_create("gammaslim-cache")
            _memory.append(file)
            self._temporary = Path(f"/proc/{os.getpid()}/fd/{file}")
            return NodeStep("build", self._temporary)
        self._final_step = NodeStep("off", reason=place.reason)
        return self._final_step

    def _begin(self, folder: Path) -> NodeStep:
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
            if not _acquire(self._lock):
                return NodeStep("wait")
            if stored := self.options.find(key):  # it was completed meanwhile
                self._final_step = NodeStep("ready", stored.path, found=True)
                return self._final_step
            for left in folder.glob(f".{key}.*.tmp"):  # of a killed job: nobody holds the lock
                remove(left)
            name = f".{key}.{socket.gethostname()}.{os.getpid()}.tmp"
            self._temporary, self._final = folder / name, folder / f"{key}.images"
            self._temporary.touch()
        except OSError as error:
            raise cannot_begin(folder, error) from error
        return NodeStep("build", self._temporary)

    def finish(self, writer: StoreWriter, missing: list[int]) -> None:
        """Complete the file and give it its final name."""
        try:
            writer.finish(self.images.key, missing)
            if self._final and self._temporary:
                publish(self._temporary, self._final)
            self._final_step = NodeStep("ready", self._final or self._temporary)
        except StorageError as error:
            self.fail(error)

    def fail(self, error: GammaslimError | OSError) -> None:
        """Abandon the cache: ``auto`` continues without one, the other modes end the job."""
        kind = type(error) if isinstance(error, GammaslimError) else StorageError
        automatic = self.options.mode == "auto"
        self._final_step = NodeStep(
            "off", reason=str(error), error=None if automatic else (kind, str(error))
        )
        self.close()

    def close(self) -> None:
        """Remove an incomplete file, and release the lock."""
        complete = self._final_step is not None and self._final_step.state == "ready"
        if self._temporary and not complete:
            if self._final:
                remove(self._temporary)
            elif _memory:
                os.close(_memory.pop())
            self._temporary = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _acquire(file: int) -> bool:
    """Acquire a lock that ends with this process; True if the storage has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # two builders then write two temporary files, and one replaces the other
        return True
    return True
