"""A run directory in an object store: the run works in local scratch, its files go to the store.

Threads of the main process upload complete files. However and whenever the job ends, the store
holds a run that another job can fetch and resume:

- ``config.toml`` is uploaded first, then ``metrics.jsonl``, then the rest in the order of
  completion; within a round or a checkpoint the file that makes it complete comes last;
- what the run has deleted is deleted only once everything newer is uploaded.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from job.artifacts.mirror_units import (
    ATTEMPT,
    GROWING,
    Stamp,
    Unit,
    complete_files,
    is_marker,
    stamp_of,
    units_of,
)
from job.artifacts.store_lock import StoreLock
from job.console import counted, say, warn
from job.errors import GammaslimError, shown
from job.files import discard, new_directory, remove, write_bytes, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from job.artifacts.object_store import Store

PERIOD = 2.0  # seconds between looks at the run directory
MAX_WAIT = 30.0  # seconds between attempts while the store does not respond


class Mirror:
    """Copies the run directory ``run`` to ``store``, from ``start`` to ``finish``."""

    def __init__(self, store: Store, run: Path) -> None:
        self.store, self.run = store, run
        self.lock = StoreLock(store, run)
        self.sent: dict[str, Stamp | None] = {}  # by name; None: in the store, but incomplete
        self._record, self._staged = run.parent / "sent.json", run.parent / ".staged"
        self._closing, self._claimed = threading.Event(), False
        self._blocked = False  # another job holds the run: what is new stays here
        self._progress, self._problem = time.monotonic(), ""
        self._thread = threading.Thread(target=self._upload_until_closed, daemon=True)

    # -- fetch

    def fetch(self) -> None:
        """Make ``run`` the newest state of the run: the files in the store, or the local files.

        The local files are newer if the last job that wrote to the store ran on this machine.
        """
        names = self.store.list()
        attempt = self.store.read(ATTEMPT) if ATTEMPT in names else None
        if self.run.is_dir() and (not names or attempt == _content(self.run / ATTEMPT) is not None):
            self._restore_record()
            self.lock.fetch(wrote_last=True)
        else:
            self._set_aside()
            self._download(names)
            self.lock.fetch(wrote_last=False)

    def _download(self, names: Iterable[str]) -> None:
        complete, rest = complete_files(names)
        if complete:
            say(f"fetching {counted(len(complete), 'file')} of {self.store.url}")
            with new_directory(self.run) as folder:
                for name in complete:
                    self.store.get(name, folder / name)
        self.sent = dict.fromkeys(rest)
        self.sent |= {name: stamp_of(self.run / name) for name in complete}
        self._save_record()

    def _restore_record(self) -> None:
        with suppress(OSError, ValueError, TypeError, AttributeError):
            record = json.loads(self._record.read_text("utf-8"))
            self.sent = {name: tuple(stamp) if stamp else None for name, stamp in record.items()}

    def _save_record(self) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._record, self.sent)

    def _set_aside(self) -> None:
        """Discard the local run, or set it aside if it has unsent files; another job resumed it."""
        if not self.run.is_dir():
            return
        self._restore_record()
        unsent = [name for unit in units_of(self.run) for name in self._changed(unit)]
        if not unsent:
            discard(self.run)
            return
        other = self.run.with_name(f"{self.run.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        self.run.rename(other)
        warn(
            f"another job has resumed {self.store.url}: the local copy, with "
            f"{counted(len(unsent), 'file')} that the store lacks, is moved to {shown(other)}"
        )

    # -- upload

    def start(self) -> None:
        """Start to upload, and to keep the lock of the run in the store."""
        self._thread.start()
        self.lock.start()

    def finish(self, patience: float) -> bool:
        """Upload the rest and stop; return whether the store has everything.

        Waits as long as the store takes files, and ``patience`` seconds when it does not.
        """
        self._progress = time.monotonic()
        self._closing.set()
        while self._thread.is_alive() and time.monotonic() - self._progress < patience:
            self._thread.join(0.1)
        complete = not self._thread.is_alive() and not self._blocked
        self.lock.finish(release=complete)
        if not complete:
            warn(self.unsent())
        return complete

    def unsent(self) -> str:
        """Return what is missing in the store, and what to do, for a message."""
        why = "another job holds the run" if self._blocked else self._problem or "the store is slow"
        missing = sum(len(self._changed(unit)) for unit in units_of(self.run))
        return (
            f"{self.store.url} lacks {counted(missing, 'file')} of this run "
            f"({why}): they are in {shown(self.run)}; run the "
            "same command again on this machine to upload them"
        )

    def _upload_until_closed(self) -> None:
        wait, ended = 0.0, False
        while True:
            ended = self._closing.wait(min(PERIOD, wait) if ended else wait) or ended
            try:
                self.upload()
            except (GammaslimError, OSError) as error:
                self._report(str(error))
                self.store.reconnect()
                wait = min(MAX_WAIT, 2 * wait + 1)
                if ended:
                    time.sleep(1)
                continue
            self._report("")
            wait = PERIOD
            if ended:
                return

    def _report(self, problem: str) -> None:
        if problem and not self._problem:
            warn(f"{problem} (the job continues, and its files are kept in {shown(self.run)})")
        elif self._problem and not problem:
            say(f"{self.store.url} responds again: all files are uploaded")
        self._problem = problem

    def upload(self) -> None:
        """Upload what is new, then delete what is gone. Raises StorageError or OutputError."""
        units = sorted(units_of(self.run), key=lambda unit: unit.order)
        new = any(map(self._changed, units))
        if self.lock.lost or not (self._claimed or (new and self._claim())):
            self._blocked = new
            return
        present = {name for unit in units for name in unit.stamps}
        staged = [(unit, self._stage(unit)) for unit in units if self._changed(unit)]
        try:
            for unit, files in staged:
                if files is not None and not self.lock.lost:
                    self._send(unit, files)
        finally:
            remove(self._staged)
        if all(files is not None for _, files in staged) and not self.lock.lost:
            gone = [name for name in self.sent if name not in present]
            self._delete(sorted(gone, key=lambda name: not is_marker(name)))

    def _claim(self) -> bool:
        """Record this job in the store as its last writer; return False if it may not write."""
        if not self.lock.may_write():
            return False
        attempt = uuid.uuid4().hex.encode()
        write_bytes(self.run / ATTEMPT, attempt)
        self.store.write(ATTEMPT, attempt)
        self._claimed, self._blocked = True, False
        return True

    def _changed(self, unit: Unit) -> list[str]:
        """Return the names of files to upload, the marker last."""
        names = [name for name, stamp in unit.stamps.items() if self.sent.get(name) != stamp]
        return sorted(names, key=lambda name: (name == unit.marker, name))

    def _stage(self, unit: Unit) -> dict[str, Path] | None:
        """Link the files of a unit, or copy those that grow; None if the run has deleted one."""
        self._staged.mkdir(parents=True, exist_ok=True)
        files = {}
        for name in self._changed(unit):
            files[name] = self._staged / uuid.uuid4().hex
            try:
                if name.split("/")[0] in GROWING:
                    shutil.copyfile(self.run / name, files[name])
                else:
                    os.link(self.run / name, files[name])
            except FileNotFoundError:
                return None
        return files

    def _send(self, unit: Unit, files: dict[str, Path]) -> None:
        replaced = any(name in self.sent for name in files if name != unit.marker)
        if unit.marker in self.sent and replaced:  # incomplete until its marker is there again
            self._delete([unit.marker])
        for name, path in files.items():
            self.store.put(path, name)
            self.sent[name] = unit.stamps[name]
            self._save_record()
            self._progress = time.monotonic()

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.store.delete([name])
            self.sent.pop(name, None)
            self._save_record()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
