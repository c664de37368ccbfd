"""Run programs from stdin, each in a fork of this process that has torch and the job imported.

A program that would take seconds to start costs a fork. One JSON object a line, in and out:
``program`` as what follows ``python`` (``-m MODULE`` or a script, and its arguments), ``env`` and
``cwd`` of its own, files for its output, a time that it is held to, and for hostile input a guard
on memory. A job is brief (``support.brief_jobs``; ``report`` draws all figures), and has no loader
process unless ``--workers`` is given.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import PIL.Image
import torch
import torch._meta_registrations
from forked_ranks import fork_ranks

import job.__main__
import job.cli.evaluation_images
import job.pipeline.resources
import job.pipeline.setup
from job.models.factory import build_network
from job.slimming.planning.cost import network_cost

PRELOADED = (
    "accelerate", "matplotlib.backends.backend_agg", "torch._dynamo", "torch.distributed.run",
    "matplotlib.figure", "job.cli.evaluate", "job.cli.export", "job.cli.inspect", "job.cli.predict",
    "job.cli.sensitivity", "job.cli.slim", "job.pipeline.prune",
)  # fmt: skip
BRIEF = runpy.run_path(str(Path(__file__).parents[1] / "brief_jobs.py"))
GUARD = 12 << 30  # bytes of address space: saves the machine; what is judged is measured


def serve() -> None:
    """Answer every line of stdin."""
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    PIL.Image.init()
    BRIEF["make_jobs_brief"]()
    for module in (job.cli.evaluation_images, job.pipeline.resources, job.pipeline.setup):
        module.default_workers = lambda *_: 0  # type: ignore[attr-defined]
    network = build_network("student", 3, {"base": 1})
    network_cost(network, 32)  # loads what is imported at first use
    torch.optim.AdamW(network.parameters())
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Exit code (negative: a signal), seconds, peak resident bytes of one program."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(case)
    handle = os.pidfd_open(child)
    ready, _, _ = select.select([handle], [], [], case["limit"])
    os.close(handle)
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status) if ready else None,
        "seconds": time.monotonic() - began,
        "memory": usage.ru_maxrss * 1024,
    }


def _become(case: dict[str, Any]) -> NoReturn:
    try:
        os.setsid()
        if case["guard"]:
            resource.setrlimit(resource.RLIMIT_AS, (GUARD, GUARD))
        os.chdir(case["cwd"])
        for number, name in ((0, os.devnull), (1, case["out"]), (2, case["err"])):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(name, flags, 0o600), number)
        fork_ranks(case["program"], _run)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    _run(case["program"], case["env"])


def _run(program: list[str], env: dict[str, str]) -> NoReturn:
    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores)))
        if program[:3] == ["-m", "job", "report"]:
            BRIEF["draw_all"]()
        _start(*program)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        _end(code)


def _start(first: str, *args: str) -> None:
    """As ``python`` would, but that a module which is imported is not executed again."""
    if first != "-m":
        sys.argv, sys.path[0] = [first, *args], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")
        return
    module, *rest = args
    sys.argv, sys.path[0] = [module, *rest], str(Path.cwd())
    if module == "job":  # loader processes look up the main module by its name
        sys.modules["__main__"] = job.__main__
        job.__main__.main()
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end(code: int) -> NoReturn:
    """As Python ends, without tearing down what other forks share."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
