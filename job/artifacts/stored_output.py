"""``--output`` as the URL of an object store: a local run directory, kept in the store."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from job.artifacts.mirror import Mirror
from job.artifacts.object_store import Store, is_store_url, local_scratch
from job.artifacts.stored_places import note_place
from job.console import say
from job.distributed.collectives import on_main
from job.distributed.signals import deferred
from job.errors import OutputError, StopRequest, StorageError, shown
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from job.config import PruneConfig

GUARD = 5.0  # seconds that a job waits for another one on this machine to end
STORE_PATIENCE = 300.0  # seconds that the end of a run waits for a store that takes no file
STORE_STOP_PATIENCE = 20.0  # the same for a job that is stopped


@contextmanager
def stored_output(config: PruneConfig) -> Iterator[PruneConfig]:
    """Yield the options with a local ``output``, and keep its run in the store that they name.

    Options with a path as their ``output`` are yielded as they are. The main process fetches the
    run before the block and uploads it during the block. At its end all processes wait until it
    is uploaded; StorageError is raised if the store does not take it. Raises OutputError,
    StorageError or UsageError when the store cannot be used.
    """
    if not config.output or not is_store_url(config.output):
        yield config
        return
    store = Store(config.output)
    run = scratch_of(store)
    local = replace(config, output=str(run))
    note_place(run, store.url)
    if not is_main():
        with _waiting_for_main():
            yield local
        return
    with _only_job_here(run, waits=not config.dry_run) as only:
        mirror = Mirror(store, run)
        if only:
            mirror.fetch()
        store.check_writable()
        if config.dry_run:
            yield local
            return
        say(f"output: {store.url}, by way of {shown(run)}")
        mirror.start()
        with _uploading(mirror):
            yield local


@contextmanager
def _only_job_here(run: Path, *, waits: bool) -> Iterator[bool]:
    """Yield whether no other job of this machine uses ``run``.

    With ``waits``, waits up to GUARD seconds for the processes of a killed job to end, then raises
    OutputError.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / ".guard").open("wb") as file:
        until, free = time.monotonic() + (GUARD if waits else 0), False
        while not free:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except OSError:
                if time.monotonic() >= until:
                    break
                time.sleep(0.2)
        if waits and not free:
            raise OutputError(
                f"{shown(run)} is in use by another job on this machine: wait for it or stop it, "
                "or choose another --output"
            )
        yield free


@contextmanager
def _waiting_for_main() -> Iterator[None]:
    try:
        yield
    except StopRequest:
        on_main(lambda: None)
        raise
    on_main(lambda: None)


@contextmanager
def _uploading(mirror: Mirror) -> Iterator[None]:
    try:
        yield
    except (StopRequest, KeyboardInterrupt):
        with deferred():
            on_main(lambda: mirror.finish(STORE_STOP_PATIENCE))
        raise
    except BaseException:
        with deferred():
            mirror.finish(STORE_STOP_PATIENCE)
        raise
    with deferred():
        complete = on_main(lambda: mirror.finish(STORE_PATIENCE))
    if not complete:
        raise StorageError(mirror.unsent())
    say(f"stored in {mirror.store.url}")


def scratch_of(store: Store) -> Path:
    """Return the local folder of a run in ``store``, shared by this user's jobs on this machine."""
    base = local_scratch()
    mine = base / f"gammaslim-runs-{os.getuid()}"
    try:
        mine.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = mine.stat().st_uid
    except OSError as error:
        raise OutputError(f"cannot write into {shown(base)}: {error.strerror}") from error
    if owner != os.getuid():
        raise OutputError(f"{shown(mine)} belongs to another user: set TMPDIR to a folder of yours")
    return mine / uuid.uuid5(uuid.NAMESPACE_URL, store.url).hex[:16] / store.name
