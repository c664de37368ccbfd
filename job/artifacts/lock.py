"""Lock of a run directory: one job at a time, also on shared storage.

``RUN/lock.json`` names the job that holds the run; its modification time is the job's heartbeat. A
job in the same PID namespace is looked up by PID and start time, so a killed job blocks nobody. A
job on another host or in another container is known only by its heartbeat, measured by the clock of
the file system: after ``STALE`` seconds without a heartbeat, the lock is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.json_records import from_json, to_json
from job.artifacts.records import LockRecord
from job.errors import OutputError, StorageError, shown, writing
from job.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

BEAT = 3.0  # seconds between heartbeats
STALE = 30.0  # seconds without a heartbeat after which a job counts as dead
SETTLE = 0.5  # seconds after which two jobs that take over at the same time see each other


class Lock:
    """The right to write into ``run``, held from ``acquire`` to ``release``."""

    def __init__(self, run: Path) -> None:
        self.path = run / "lock.json"
        self.held = False
        self.lost = False  # another job has taken over, since this one sent no heartbeat
        self._record = _this_process()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the lock and start its heartbeat; raises OutputError while another job holds it.

        The check for a live job on another host takes up to ``STALE`` seconds; ``say`` reports the
        wait. Raises StorageError when the lock cannot be written.
        """
        if not self._create():
            self._take_over(say)
        self.held = True
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop the heartbeat and remove the lock."""
        self.held = False
        self._ended.set()
        if self._thread:
            self._thread.join()
        if self._is_held_by_this():
            with suppress(OSError):
                self.path.unlink()

    def _create(self) -> bool:
        """Write the lock atomically; return False if there already is one."""
        temporary = self.path.with_name(f".{self.path.name}.{self._record.id}.tmp")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(to_json(self._record)) + "\n")
                _link(temporary, self.path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def check(self) -> None:
        """Raise OutputError when another job has taken the run over."""
        if self.lost:
            raise OutputError(
                f"{shown(self.path.parent)} was taken over by another job, since this one sent no "
                f"heartbeat for {STALE:.0f} s; this job stops and leaves the run to the other"
            )

    def _take_over(self, say: Callable[[str], None]) -> None:
        owner = self._owner()
        if self._is_alive(owner, say):
            raise OutputError(
                f"{shown(self.path.parent)} is in use by {_describe(owner)}: wait for it or stop "
                "it, or choose another --output"
            )
        write_json(self.path, to_json(self._record))
        time.sleep(SETTLE)
        if not self._is_held_by_this():
            raise OutputError(
                f"another job has just taken {shown(self.path.parent)}: choose another --output"
            )

    def _is_alive(self, owner: LockRecord | None, say: Callable[[str], None]) -> bool:
        if owner and self._is_here(owner):
            return _start_time(owner.pid) == owner.started
        first = self._beat()
        if first is None:  # released just now
            return False
        announced = False
        while (age := self._age()) is not None and age < STALE:
            if self._beat() != first:
                return True
            if not announced:
                say(
                    f"waiting up to {STALE:.0f} s: {_describe(owner)} holds {shown(self.path)} and "
                    "may be alive"
                )
                announced = True
            time.sleep(1)
        return False

    def alive(self) -> bool:
        """Return whether a live job holds the lock, without waiting or writing.

        The answer is up to STALE seconds late for a job that died on another host or in another
        container.
        """
        owner = self._owner()
        if not owner:
            return False
        if self._is_here(owner):
            return _start_time(owner.pid) == owner.started
        try:
            age = self._age()
        except StorageError:  # this user can only read: measure by this host's clock
            beat = self._beat()
            age = None if beat is None else time.time() - beat / 1e9
        return age is not None and age < STALE

    def _is_here(self, owner: LockRecord) -> bool:
        """Return whether ``owner`` is in this PID namespace, where its PID can be looked up."""
        mine = self._record
        return (owner.boot, owner.processes) == (mine.boot, mine.processes)

    def _is_held_by_this(self) -> bool:
        owner = self._owner()
        return owner is not None and owner.id == self._record.id

    def _owner(self) -> LockRecord | None:
        """Return the holder of the lock; None if nobody holds it or the file is damaged."""
        try:
            return from_json(LockRecord, json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError, RecursionError):
            return None

    def _beat(self) -> int | None:
        """Return the time of the last heartbeat in ns; opening the file refreshes NFS's cache."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def _age(self) -> float | None:
        """Return the seconds since the last heartbeat by the file system's clock, or None."""
        probe = self.path.with_name(f".lock.{self._record.id}.tmp")
        with writing(probe):
            try:
                probe.write_bytes(b"?")
                now = probe.stat().st_mtime_ns
            except FileNotFoundError:  # removed by the live job's tidy
                return 0.0
            finally:
                probe.unlink(missing_ok=True)
        beat = self._beat()
        return None if beat is None else (now - beat) / 1e9

    def _keep_alive(self) -> None:
        while not self._ended.wait(BEAT):
            owner = self._owner()
            if owner and owner.id != self._record.id:
                self.lost = True
                return
            with suppress(OSError):  # a full or read-only disk is reported elsewhere
                os.utime(self.path)


def current_state(run: Path, state: str) -> str:
    """Return the state of a run whose status.json has ``state``.

    A run is running only while a live job holds it. A killed job could not update the file: such a
    run has died.
    """
    return "died" if state == "running" and not Lock(run).alive() else state


def _link(source: Path, target: Path) -> None:
    """Link ``target`` to a file atomically; raises FileExistsError, on NFS too."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with target.open("xb") as file:
            file.write(source.read_bytes())


def _describe(owner: LockRecord | None) -> str:
    return f"process {owner.pid} on {owner.host}" if owner else "another process"


def _this_process() -> LockRecord:
    """Return the identity of this process and its PID namespace."""
    host = socket.gethostname()
    return LockRecord(
        id=str(uuid.uuid4().int),  # digits: tidy knows temporary files by them
        host=host,
        boot=_read_line("/proc/sys/kernel/random/boot_id") or host,
        processes=str(_namespace()),
        pid=os.getpid(),
        started=_start_time(os.getpid()),
    )


def _namespace() -> Path | None:
    with suppress(OSError):
        return Path("/proc/self/ns/pid").readlink()
    return None


def _start_time(pid: int) -> str | None:
    """Return when a process started, in ticks since boot: PIDs are reused, this pair is not."""
    stat = _read_line(f"/proc/{pid}/stat")
    if not stat:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def _read_line(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except OSError:
        return ""
