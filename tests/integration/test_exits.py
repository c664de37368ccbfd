"""How processes end: with their own exit code, whatever the threads of gloo are doing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from job.cli import command
from job.cli.process_exit import run_and_exit
from job.distributed import signals
from job.distributed.agent import _exit_code
from job.errors import GammaslimError
from support.commands import ROOT, run
from support.datasets import write_flat

WORKERS = ROOT / "tests" / "support" / "workers"

# each child leaves with collectives in progress, as a rank does when the machine is busy: without
# run_and_exit a quarter of them ends with SIGABRT (torch 2.14, CPython 3.11)
LEAVING = """
import os, sys
import click, torch, torch.distributed as dist
from job.__main__ import main
from job.cli.main import gammaslim

@gammaslim.command()
@click.argument("code", type=int)
@click.pass_context
def leaving(ctx, code):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    global tensors
    tensors = [torch.zeros(1) for _ in range(200)]
    sys.setswitchinterval(1000)
    for tensor in tensors:
        dist.all_reduce(tensor, async_op=True)
    ctx.exit(code)

for code in [0, 75] * 12:
    child = os.fork()
    if child == 0:
        sys.argv = ["gammaslim", "leaving", str(code)]
        main()
    print(code, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_process_that_leaves_gloo_at_work_keeps_its_exit_code() -> None:
    done = run(sys.executable, "-c", LEAVING, env={"OMP_NUM_THREADS": "1"})
    ends = [tuple(map(int, line.split())) for line in done.out.splitlines()]
    assert len(ends) == 24, done
    assert [end for end in ends if len(set(end)) > 1] == [], done.err


def child(program: Callable[[], object]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a forked process that runs ``program`` and ends."""
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if pid == 0:
        sys.stdout, sys.stderr = (os.fdopen(write, "w") for _, write in pipes)
        run_and_exit(program)
    for _, write in pipes:
        os.close(write)
    out, err = (os.fdopen(read).read() for read, _ in pipes)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out, err


def bug() -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (lambda: None, 0, ""),
        (sys.exit, 0, ""),
        (lambda: sys.exit(78), 78, ""),
        (lambda: sys.exit("no such thing"), 1, "no such thing"),
        (bug, 1, "RuntimeError: a bug"),
    ],
    ids=["returns", "exit", "exit 78", "exit with a text", "bug"],
)
def test_exit_codes_output_and_exit_functions(
    program: Callable[[], object], code: int, said: str
) -> None:
    def whole() -> None:
        import atexit

        atexit._clear()  # the functions of pytest's own process
        atexit.register(lambda: print("exit function"))
        print("output", end=" ")
        program()

    ended, out, err = child(whole)
    assert (ended, out) == (code, "output exit function\n")
    assert said in err
    assert bool(err) == bool(said)


def test_two_processes_end_with_the_code_of_the_one_that_knows_the_reason(tmp_path: Path) -> None:
    """One that has lost the other ends with 1, later; ``launch`` gives the reason's code."""
    data = write_flat(tmp_path / "data", {"training": 2, "validation": 1}, size=32)
    done = run(
        sys.executable, WORKERS / "ends.py", tmp_path, "prune", "--model", "ends:tiny",
        "--data", data, "--transform", "small", "--image-size", 32, "--batch-size", 3,
        "--base-epochs", 1, "--rounds", 0, "--wandb", "off",
    )  # fmt: skip
    found = [json.loads(line) for line in done.out.splitlines()]
    codes = {}
    for end in found:
        failures = [
            SimpleNamespace(local_rank=rank, exitcode=code, timestamp=place)
            for place, (rank, code) in enumerate(end["ends"])
            if code
        ]
        key = end["fault"], end["workers"]
        codes[key] = _exit_code(failures, []) if failures else 0  # type: ignore[arg-type]
    assert codes == {
        ("none", 0): 0, ("dict", 0): 2, ("bug 1", 0): 1, ("data 1", 0): 65, ("data 1", 1): 65,
        ("stop", 0): 75,
    }, found  # fmt: skip
    both = {end["fault"]: {code for _, code in end["ends"]} for end in found}
    assert (both["none"], both["dict"], both["stop"]) == ({0}, {2}, {75}), found
    for end in found:
        said = end["log"].count("Error: ") - end["log"].count("the other processes are gone")
        assert said == int(end["fault"] != "none"), end["log"]


@pytest.mark.parametrize("asked", [True, False])
def test_who_has_lost_the_others_is_silent_where_the_launcher_ends_it(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals._State, "requested", asked)
    monkeypatch.setattr(command, "REASON_FIRST", 0.0)
    lost = GammaslimError("the other processes are gone")
    lost.late = True
    assert command._reports(lost) == (not asked)
