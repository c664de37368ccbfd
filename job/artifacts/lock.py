"""One job at a time in a run directory, on shared storage too.

``RUN/lock.json`` names the job that works there; its time of change is the job's heartbeat. A job
in the same process-number space is looked up by pid and start time, so one that was killed blocks
nobody. Of another host or container only the heartbeat can tell, measured on the file system's own
clock: without one for ``STALE`` seconds the lock is taken over.
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
from typing import TYPE_CHECKING, Any

from job.errors import OutputError, StorageError, shown, writing
from job.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

BEAT = 3.0  # seconds between heartbeats
STALE = 30.0  # seconds without one after which a job counts as dead
SETTLE = 0.5  # seconds in which two that take over at the same time see each other


class Lock:
    """The right to write into ``run``, from ``acquire`` to ``release``."""

    def __init__(self, run: Path) -> None:
        self.path = run / "lock.json"
        self.held = False
        self.lost = False  # another job has taken over: this one was silent for too long
        self._mine = {"id": str(uuid.uuid4().int), **_this_process()}  # digits, as tidy knows them
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the lock and keep it alive; raises OutputError while another job has it.

        ``say`` gets a line when it must be found out whether a job on another host lives: that
        takes up to ``STALE`` seconds. Raises StorageError when the lock cannot be written.
        """
        if not self._create():
            self._take_over(say)
        self.held = True
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back."""
        self.held = False
        self._ended.set()
        if self._thread:
            self._thread.join()
        if self._owner().get("id") == self._mine["id"]:
            with suppress(OSError):
                self.path.unlink()

    def _create(self) -> bool:
        """Put our own lock there in one piece; False when there is one."""
        temporary = self.path.with_name(f".{self.path.name}.{self._mine['id']}.tmp")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(self._mine) + "\n")
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
                f"{shown(self.path.parent)} was taken over by another job while this one gave no "
                f"sign of life for {STALE:.0f} s; this one stops and leaves the run to it"
            )

    def _take_over(self, say: Callable[[str], None]) -> None:
        owner = self._owner()
        if self._lives(owner, say):
            raise OutputError(
                f"{shown(self.path.parent)} is in use by process {owner.get('pid')} on "
                f"{owner.get('host')}: wait for it or stop it, or choose another --output"
            )
        write_json(self.path, self._mine)
        time.sleep(SETTLE)
        if self._owner().get("id") != self._mine["id"]:
            raise OutputError(
                f"{shown(self.path.parent)} has just been taken by another job: "
                "choose another --output"
            )

    def _lives(self, owner: dict[str, Any], say: Callable[[str], None]) -> bool:
        if self._is_here(owner):
            return _start_time(owner.get("pid")) == owner.get("started")
        first = self._beat()
        if first is None:  # released just now
            return False
        said = False
        while (age := self._age()) is not None and age < STALE:
            if self._beat() != first:
                return True
            if not said:
                say(
                    f"waiting up to {STALE:.0f} s: {shown(self.path)} is of process "
                    f"{owner.get('pid')} on {owner.get('host')}, which may be alive"
                )
                said = True
            time.sleep(1)
        return False

    def alive(self) -> bool:
        """Whether a live job has the lock, for readers: waits for nothing, takes nothing.

        Of a job on another host or in another container that died it may be STALE seconds late.
        """
        owner = self._owner()
        if not owner:
            return False
        if self._is_here(owner):
            return _start_time(owner.get("pid")) == owner.get("started")
        try:
            age = self._age()
        except StorageError:  # read-only for this user: by this host's clock
            beat = self._beat()
            age = None if beat is None else time.time() - beat / 1e9
        return age is not None and age < STALE

    def _is_here(self, owner: dict[str, Any]) -> bool:
        """Whether ``owner`` shares this process's numbers, so that its pid tells if it lives."""
        return all(owner.get(key) == self._mine[key] for key in ("boot", "processes"))

    def _owner(self) -> dict[str, Any]:
        """Who has the lock; empty when nobody has, or its file is damaged."""
        try:
            content = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _beat(self) -> int | None:
        """The last heartbeat, as the file system dates it; opening renews what NFS remembers."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def _age(self) -> float | None:
        """Seconds since the last heartbeat, by the clock that dated it; None without a lock."""
        probe = self.path.with_name(f".lock.{self._mine['id']}.tmp")
        with writing(probe):
            try:
                probe.write_bytes(b"?")
                now = probe.stat().st_mtime_ns
            except FileNotFoundError:  # tidied away by the job that lives
                return 0.0
            finally:
                probe.unlink(missing_ok=True)
        beat = self._beat()
        return None if beat is None else (now - beat) / 1e9

    def _keep_alive(self) -> None:
        while not self._ended.wait(BEAT):
            owner = self._owner()
            if owner and owner.get("id") != self._mine["id"]:
                self.lost = True
                return
            with suppress(OSError):  # a full or read-only disk shows itself elsewhere
                os.utime(self.path)


def present_state(run: Path, state: str) -> str:
    """``state`` of a status.json as it is now: a run is running only while a live job holds it.

    One whose job was killed, and could not write so, has died.
    """
    return "died" if state == "running" and not Lock(run).alive() else state


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; raises FileExistsError, on NFS too."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with target.open("xb") as file:
            file.write(source.read_bytes())


def _this_process() -> dict[str, Any]:
    """Who this process is, and in which space of process numbers: boot and pid namespace."""
    host = socket.gethostname()
    return {
        "host": host,
        "boot": _text("/proc/sys/kernel/random/boot_id") or host,
        "processes": str(_namespace()),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }


def _namespace() -> Path | None:
    with suppress(OSError):
        return Path("/proc/self/ns/pid").readlink()
    return None


def _start_time(pid: Any) -> str | None:
    """When a process started, in ticks since boot: a number is used again, this is not."""
    stat = _text(f"/proc/{pid}/stat")
    if not stat:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def _text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except OSError:
        return ""
