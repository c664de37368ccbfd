"""Processes of a launcher as forks, made before it starts: they have none of its threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

LAUNCHERS = (["-m", "job", "launch"], ["-m", "torch.distributed.run"])
RANKS = 2  # more are started as programs

Start = Callable[[list[str], dict[str, str]], NoReturn]


class Rank:
    """A fork that waits for its program. Once it has one, it stands in for a ``Popen``."""

    def __init__(self, start: Start, others: Sequence[Rank]) -> None:
        reading, self.writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            os.close(reading)
            return
        for rank in (*others, self):
            os.close(rank.writing)
        os.setsid()
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        if not text:  # the launcher has ended, or needs fewer
            os._exit(0)
        start(*json.loads(text))

    def run(self, program: Sequence[str], env: Mapping[str, str]) -> None:
        with os.fdopen(self.writing, "w") as pipe:
            json.dump([list(program), dict(env)], pipe)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return code


def fork_ranks(program: Sequence[str], start: Start) -> None:
    """Have ``program``, if it is a launcher, run its first processes by ``start`` in forks."""
    if not any(list(program[: len(launcher)]) == launcher for launcher in LAUNCHERS):
        return
    ranks: list[Rank] = []
    for _ in range(RANKS):
        ranks.append(Rank(start, ranks))
    start_program = SubprocessHandler._popen

    def popen(handler: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> Any:
        if not ranks or args[0] != sys.executable:
            return start_program(handler, args, env)
        rank = ranks.pop(0)
        rank.run(args[2:] if args[1] == "-u" else args[1:], env)
        return rank

    SubprocessHandler._popen = popen  # type: ignore[method-assign]
