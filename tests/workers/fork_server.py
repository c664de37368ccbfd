"""Run ``gammaslim`` command lines from stdin, each in a fork of this process.

Python, torch and the commands are imported once, so that a command costs a fork in place of
seconds. One JSON object a line, in and out; each fork is held to a time and a guard on memory.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

import PIL.Image
import torch
import torch._meta_registrations

import job.commands.cut
import job.commands.inspect
import job.commands.score
import job.commands.slim
import job.pipeline  # noqa: F401
from job.__main__ import main
from job.models import build
from job.slimming.cost import network_cost

GUARD = 12 << 30  # bytes of address space: saves the machine; what is judged is measured


def serve() -> None:
    """Answer every line of stdin."""
    torch.set_num_threads(1)
    PIL.Image.init()
    network_cost(build("student", 3, {"base": 1}), 32)  # loads what is imported at first use
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Exit code (negative: a signal), seconds, peak resident bytes of one command line."""
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
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (GUARD, GUARD))
        os.chdir(case["cwd"])
        for number, name in ((0, os.devnull), (1, case["out"]), (2, case["err"])):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(name, flags, 0o600), number)
        for name in [n for n in os.environ if n.startswith(("WANDB_", "GAMMASLIM_"))]:
            del os.environ[name]
        os.environ.update(case["env"])
        sys.argv = ["gammaslim", *case["args"]]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
