"""Run by test_processes: pairs of processes whose main one works alone, is killed, or is stopped.

Prints a line of JSON for each process: how it ended, after how many seconds, and its CPU seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta

import torch

from job.distributed import collectives as processes
from job.distributed.collectives import leave, lost_others, on_main, start, total
from job.processes import rank

WORK = 3.0  # seconds that the main process works alone: more than any limit here


def work(event: str) -> str:
    if event != "works":
        os.kill(os.getpid(), signal.SIGKILL if event == "dies" else signal.SIGSTOP)
    if event == "works":
        deadline = time.monotonic() + WORK
        while time.monotonic() < deadline:
            sum(range(100000))  # Python at work: the signs of life need its lock too
    return "done"


def process(event: str) -> str:
    """What this rank of the pair sees of ``event``."""
    start("cpu", "fp32")
    total(torch.zeros(1))
    began, used = time.monotonic(), time.process_time()
    try:
        ended = on_main(lambda: work(event))
    except RuntimeError as error:
        assert lost_others(error), error
        ended = "lost"
    except processes.GammaslimError as error:
        ended = str(error)
    leave()
    seconds, cpu = time.monotonic() - began, time.process_time() - used
    return json.dumps({"event": event, "rank": rank(), "ended": ended, "s": seconds, "cpu": cpu})


def pair(event: str) -> list[int]:
    """Start both processes; their numbers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    children = []
    for number in ("0", "1"):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=number, LOCAL_RANK=number, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.write(1, (process(event) + "\n").encode())
            os._exit(0)
        children.append(child)
    return children


if __name__ == "__main__":
    processes.TIMEOUT, processes.SILENCE = timedelta(seconds=9), timedelta(seconds=1)
    pairs = [pair(event) for event in sys.argv[1:]]
    for main, other in pairs:
        os.waitpid(other, 0)
        os.kill(main, signal.SIGKILL)
        os.waitpid(main, 0)
