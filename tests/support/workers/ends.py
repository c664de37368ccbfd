"""Run by test_exits: pairs of ranks in forks of this process, each with a fault, and how they end.

Stands in for torch's agent: when the first of a pair fails, the other gets a SIGTERM. Prints a line
of JSON for each pair: exit codes in the order in which the ranks ended, and what they wrote.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from job.__main__ import main
from job.errors import DataError

FAULT = "FAULT"  # the environment variable: what goes wrong, and on which rank


class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.classes = nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> object:
        kind, _, rank = os.environ[FAULT].partition(" ")
        if kind == "dict":
            return {"out": images}
        if self.training and rank == os.environ["RANK"]:
            if kind == "data":
                raise DataError("an image of this rank is damaged")
            raise RuntimeError("a bug of this rank")
        if self.training and kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        return self.classes(self.features(images).mean((2, 3)))


def tiny(num_classes: int) -> nn.Module:
    return Tiny(num_classes)


def become(rank: int, port: int, fault: str, log: int, args: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ[FAULT] = fault
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["gammaslim", *args]
    main()


def pair(fault: str, args: list[str]) -> dict[str, object]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        children = {}
        for rank in (0, 1):
            child = os.fork()
            if child == 0:
                become(rank, port, fault, log.fileno(), args)
            children[child] = rank
        ends = []
        while children:
            child, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            ends.append((children.pop(child), code))
            for other in children if code else ():
                os.kill(other, signal.SIGTERM)
        log.seek(0)
        return {"fault": fault, "ends": ends, "log": log.read().decode()}


if __name__ == "__main__":
    sys.modules["ends"] = sys.modules["__main__"]  # --model ends:tiny
    torch.set_num_threads(1)
    output, args = Path(sys.argv[1]), sys.argv[2:]
    for fault, workers in (
        ("none", 0), ("dict", 0), ("bug 1", 0), ("data 1", 0), ("data 1", 1), ("stop", 0),
    ):  # fmt: skip
        place = output / f"{fault} {workers}"
        command = [*args, "--workers", str(workers), "--output", str(place)]
        print(json.dumps(pair(fault, command) | {"workers": workers}), flush=True)
