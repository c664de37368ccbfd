"""The lock of a run in an object store, synchronised with the local ``lock.json``.

A job holds the lock of its local run directory. `StoreLock` copies this lock to the store with a
heartbeat. If another job's lock in the store has a new heartbeat, `StoreLock` copies that lock into
the local run directory. `Lock` then handles it as on shared storage: a job that starts waits and is
refused, and a job that has lost the run ends. ``STOP`` in the store requests the job to stop.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from job.errors import GammaslimError
from job.files import write_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from job.artifacts.object_store import Store
    from job.files import JsonObject

STORE_BEAT = 4.0  # seconds between heartbeats in the store
LOCK, STOP = "lock.json", "STOP"


class StoreLock:
    """The lock of the run directory ``run``, in ``store``."""

    def __init__(self, store: Store, run: Path) -> None:
        self.store, self.path, self.stop = store, run / LOCK, run / STOP
        self.lost = False  # another job has taken the run over
        self._foreign: str | None = None  # the id in the lock of another job
        self._last: bytes | None = None  # content of the lock in the store, when last seen
        self._written = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def fetch(self, *, wrote_last: bool) -> None:
        """Copy another job's lock from the store, and delete an old stop request.

        With ``wrote_last``, a lock of this host belongs to a job that has ended, and is deleted.
        """
        self.store.delete([STOP])
        self._last = self.store.read(LOCK)
        lock = _parsed(self._last)
        if wrote_last and lock is not None and lock.get("host") == socket.gethostname():
            self.store.delete([LOCK])
            return
        if lock is not None and lock.get("id") != (_parsed(_read(self.path)) or {}).get("id"):
            self._adopt(lock)

    def start(self) -> None:
        """Start to exchange locks."""
        self._thread.start()

    def finish(self, *, release: bool) -> None:
        """Stop; ``release`` removes the lock in the store if it is this job's."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(STORE_BEAT)
        if release and self._written and not self.lost:
            with suppress(GammaslimError):
                self.store.delete([LOCK])

    def may_write(self) -> bool:
        """Return whether this job holds the run, or nobody does."""
        return not self.lost and (self._own() is not None or not self.path.exists())

    def exchange(self) -> None:
        """Copy another job's lock if its heartbeat is new, or send this job's heartbeat.

        Also fetches a stop request. Raises StorageError.
        """
        content = self.store.read(LOCK)
        lock, own = _parsed(content), self._own()
        if lock is not None and lock.get("id") != own and content != self._last:
            self._last = content
            self.lost = own is not None
            self._adopt(lock)
        elif own is not None and not self.lost:
            mine = _parsed(_read(self.path))
            if mine is not None and mine.get("id") == own:
                self.store.write(LOCK, json.dumps(mine | {"beat": time.time_ns()}).encode())
                self._written = True
        if self.store.read(STOP) is not None:
            self.stop.touch()
            self.store.delete([STOP])

    def _keep(self) -> None:
        while not self._ended.wait(STORE_BEAT) and not self.lost:
            with suppress(GammaslimError, OSError):  # the uploads report it
                self.exchange()

    def _adopt(self, lock: JsonObject) -> None:
        """Write another job's lock into the local run directory; its time is the heartbeat."""
        self._foreign = str(lock.get("id"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = {key: value for key, value in lock.items() if key != "beat"}
        write_bytes(self.path, json.dumps(lock).encode() + b"\n")

    def _own(self) -> str | None:
        """Return the id of the local lock if this process holds it."""
        lock = _parsed(_read(self.path)) or {}
        mine = (lock.get("pid"), lock.get("host")) == (os.getpid(), socket.gethostname())
        return str(lock["id"]) if mine and lock.get("id") != self._foreign else None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _parsed(content: bytes | None) -> JsonObject | None:
    with suppress(ValueError):
        lock = json.loads(content or b"")
        return lock if isinstance(lock, dict) else None
    return None
