"""Serve ``gammaslim`` commands, each in a fork, and let the storage fail at a chosen instant.

Reads a JSON object a line: ``args``, ``output`` (a prefix for .out and .err) and, if wanted,
``event`` and ``match`` (what is done, and a pattern of the path), ``passage`` (the N-th of them)
and ``fault``: an errno's name, or ``fill:FOLDER``, which fills that file system. Answers with the
exit code. A fork spares the seconds that torch and matplotlib take to be imported.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401

import job.artifacts.model_card
import job.pipeline.prune
import job.report.page
from job.__main__ import main
from job.artifacts import tensor_file

WRITES = os.O_WRONLY | os.O_RDWR


def fill(folder: Path) -> None:
    """Leave not a byte on the file system of ``folder``."""
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


def strike(fault: str, path: str) -> None:
    if fault.startswith("fill:"):
        return fill(Path(fault[5:]))
    number = getattr(errno, fault)
    raise OSError(number, os.strerror(number), path)


def lay_in_wait(request: dict[str, Any]) -> None:
    """Strike at the N-th event; ``write`` and ``read`` are the two kinds of ``open``."""
    wanted, left, striking = request["event"], request["passage"], False

    def passing(event: str, path: object) -> None:
        nonlocal left, striking
        if striking or event != wanted or not re.search(request["match"], os.fsdecode(str(path))):
            return
        left -= 1
        if left == 0:
            striking = True
            try:
                strike(request["fault"], str(path))
            finally:
                striking = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args and isinstance(args[0], (str, bytes, Path)):
            passing("write" if int(args[2] or 0) & WRITES else "read", args[0])
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            passing(event.removeprefix("os."), args[0])

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        passing("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    save_file = tensor_file.save_file

    def save(tensors: Any, path: Path, *rest: Any) -> None:  # opened by no code of Python's
        passing("write", path)
        save_file(tensors, path, *rest)

    os.fsync, tensor_file.save_file = fsync, save
    sys.addaudithook(hook)


def child(request: dict[str, Any]) -> None:
    for number, ending in ((1, ".out"), (2, ".err")):
        target = os.open(request["output"] + ending, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(target, number)
    sys.argv = ["gammaslim", *request["args"]]
    if "event" in request:
        lay_in_wait(request)
        os.environ[IN_LOADERS] = json.dumps(request | {"passage": 1})
    main()


def serve() -> None:
    from fork_server import BRIEF  # not in the loader processes

    BRIEF["make_jobs_brief"]()
    charts = job.report.page.run_charts
    job.report.page.run_charts = lambda history: charts(history)[:1]  # fewer files that can fail
    gc.freeze()  # a collection in a child would copy all of torch
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            child(json.loads(line))
        status = os.waitpid(process, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


IN_LOADERS = "FAULT_IN_LOADERS"
if __name__ == "__main__":
    serve()
elif IN_LOADERS in os.environ:  # a loader process imports this too: its first time counts
    lay_in_wait(json.loads(os.environ[IN_LOADERS]))
