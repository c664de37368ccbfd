"""Construction of the cache by all processes of each node, in short collective steps."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.console import amount, counted, phase, say, warn
from job.data.cache.build import ShareBuilder
from job.data.cache.leader import Leader
from job.data.cache.place import uncached_message
from job.data.cache.store import StoredImages, StoreWriter
from job.distributed.collectives import gather
from job.distributed.cores import available_cores
from job.errors import GammaslimError, StorageError, shown
from job.processes import is_main, rank

if TYPE_CHECKING:
    from job.data.cache.image_set import ImageSet
    from job.data.cache.leader import CacheOptions, NodeStep
    from job.distributed.stop import Watch

SLICE = 1.0  # seconds of work between collective steps


@dataclass(frozen=True)
class _Report:
    """Progress of one process."""

    done: int = 0
    finished: bool = True
    missing: tuple[int, ...] = ()
    error: str = ""


def share_cache(images: ImageSet, options: CacheOptions, watch: Watch) -> StoredImages | None:
    """Return this node's cache, built by all of its processes; None without a cache. Collective.

    Raises StopRequest, and GammaslimError if a cache that the user requested cannot be built.
    """
    began = time.monotonic()
    nodes = gather(_this_node())
    members = [other for other, node in enumerate(nodes) if node == nodes[rank()]]
    leader = Leader(images, options) if rank() == members[0] else None
    try:
        while True:
            steps = gather(leader.next_step() if leader else None)
            states = {each.state for each in steps if each}
            if "build" in states:
                _build(images, leader, members, steps, watch)
            elif "wait" in states:
                phase("waiting for the cache that another job builds")
                time.sleep(SLICE)
                watch.check()
            else:
                break
    finally:
        phase("")
        if leader:
            leader.close()
    return _conclude(images, [each for each in steps if each], steps[members[0]], began)


def _this_node() -> tuple[str, int]:
    """Identify the node, or the container with its own processes."""
    try:
        return socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116
    except OSError:
        return socket.gethostname(), 0


def _build(
    images: ImageSet,
    leader: Leader | None,
    members: list[int],
    steps: list[NodeStep | None],
    watch: Watch,
) -> None:
    """Build the files of the nodes that have none; each process builds a share. Collective."""
    builder, failure = _join(images, members, steps[members[0]])
    if leader and failure:  # otherwise it would begin again forever
        leader.fail(failure)
    total = len(images) * sum(each is not None and each.state == "build" for each in steps)
    try:
        while True:
            reports = gather(_work(builder))
            phase("decoding images", "", sum(report.done for report in reports) / total)
            watch.check()
            mine = [reports[member] for member in members]
            if builder and any(report.error for report in mine):
                builder.finished = True
            if all(report.finished or report.error for report in reports):
                break
        if leader and builder:
            errors = [report.error for report in mine if report.error]
            if errors:
                leader.fail(StorageError(errors[0]))
            else:
                leader.finish(builder.writer, [row for each in mine for row in each.missing])
    finally:
        if builder:
            builder.close()


def _join(
    images: ImageSet, members: list[int], step: NodeStep | None
) -> tuple[ShareBuilder | None, StorageError | None]:
    """Return the builder of this process's share of its node's file, if the node builds one.

    Returns the error if this process cannot open the file. Collective.
    """
    writer, failure = None, None
    if step and step.state == "build" and step.path:
        try:
            writer = StoreWriter(step.path, images.layout)
        except StorageError as error:  # the other processes decode this share too
            failure = error
    joined = gather(writer is not None)
    builders = [member for member in members if joined[member]]
    if writer is None or not joined[members[0]]:
        if writer:
            writer.close()
        return None, failure
    rows = range(builders.index(rank()), len(images), len(builders))
    return ShareBuilder(images, writer, rows, available_cores() // len(builders)), None


def _work(builder: ShareBuilder | None) -> _Report:
    """Decode for a slice of time."""
    if builder is None:
        time.sleep(SLICE / 10)
        return _Report()
    error = ""
    try:
        builder.work(SLICE)
    except (GammaslimError, OSError) as failure:
        error = str(failure)
    missing = tuple(builder.missing) if builder.finished else ()
    return _Report(builder.done, builder.finished, missing, error)


def _conclude(
    images: ImageSet, steps: list[NodeStep], own_step: NodeStep | None, began: float
) -> StoredImages | None:
    """Open the file, and log a summary of the cache; raises the error of any node."""
    for each in steps:
        if each.error:
            kind, message = each.error
            failure = kind(message)
            failure.reported = not is_main()
            raise failure
    assert own_step
    stored = None
    if own_step.state == "ready" and own_step.path:
        stored = StoredImages.open(own_step.path, images.key)
    if stored is None and own_step.state == "ready":
        file = shown(own_step.path or "")
        warn(f"rank {rank()} decodes images in every epoch: {file} cannot be opened here")
    if is_main():
        say(_summary(images, own_step, time.monotonic() - began))
        without = [each for each in steps if each.state == "off"]
        if without and len(steps) > 1:
            nodes = f"{len(without)} of {counted(len(steps), 'node')}"
            warn(f"{nodes} decode images in every epoch: {without[0].reason}")
    return stored


def _summary(images: ImageSet, step: NodeStep, seconds: float) -> str:
    count = counted(len(images), "decoded image")
    if step.state == "off":
        return uncached_message(step.reason)
    if step.path and step.path.is_relative_to("/proc"):
        where = "in memory"
    else:
        where = f"in {shown(step.path or '')}"
    size = amount(images.layout.length)
    how = "found" if step.found else f"built in {seconds:.1f} s"
    return f"cache: {count}, {size}, {where}, {how}"
