"""How tests start programs: in a process each, or in a fork of one that has torch imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what a process must start with: a fork would come too late
EARLY = ("PYTHON", "OPENBLAS_", "MKL_", "LD_", "LC_", "LANG", "MALLOC_", "KMP_", "OMP_W")
MODULES = ("job", "torch.distributed.run")


@dataclass(frozen=True)
class End:
    """How a program ended: None for a code that it was too slow for, negative for a signal."""

    code: int | None
    out: str
    err: str
    seconds: float
    memory: int


class Server:
    """A fork server as a child process; runs one program at a time."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "support" / "workers" / "fork_server.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT,
        )  # fmt: skip

    def run(
        self,
        program: Sequence[str],
        env: dict[str, str],
        cwd: Path,
        logs: Path,
        *,
        limit: float = 900,
        guard: bool = False,
    ) -> End:
        """Run ``python PROGRAM…`` in ``cwd`` with exactly ``env``."""
        assert self.process.stdin
        assert self.process.stdout
        out, err = logs / "stdout", logs / "stderr"
        case = {
            "program": list(program), "env": env, "cwd": str(cwd), "out": str(out),
            "err": str(err), "limit": limit, "guard": guard,
        }  # fmt: skip
        print(json.dumps(case), file=self.process.stdin, flush=True)
        end = json.loads(self.process.stdout.readline())
        texts = [path.read_text("utf-8", "backslashreplace") for path in (out, err)]
        return End(end["code"], *texts, end["seconds"], end["memory"])

    def close(self) -> None:
        """End the server."""
        self.process.communicate()


_server: list[Server] = []


def run_forked(
    program: Sequence[str], env: dict[str, str], cwd: Path | None
) -> subprocess.CompletedProcess[str]:
    """As Server.run, of one server that all tests of this process share."""
    if _server and _server[0].process.poll() is not None:  # it was killed
        _server.clear()
    if not _server:
        _server.append(Server())
    with tempfile.TemporaryDirectory() as logs:
        end = _server[0].run(program, env, cwd or Path.cwd(), Path(logs))
    if end.code is None:
        raise subprocess.TimeoutExpired(list(program), end.seconds, end.out, end.err)
    return subprocess.CompletedProcess(program, end.code, end.out, end.err)


def close_server() -> None:
    """End the shared server, if there is one."""
    while _server:
        _server.pop().close()


def forkable(command: Sequence[str], env: dict[str, str]) -> bool:
    """Whether a fork of the server, given only ``env`` more, does what ``command`` does."""
    if command[0] != sys.executable or any(name.startswith(EARLY) for name in env):
        return False
    module = command[1] == "-m" and command[2] in MODULES
    return module or Path(command[1]).parent == ROOT / "tests" / "support" / "workers"
