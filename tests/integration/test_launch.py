"""``gammaslim launch``: exit codes, stop requests, a process that dies, several nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from job.distributed.cores import PATIENCE, available_cores
from job.distributed.topology import Nodes, find_nodes, nodes_left_out
from job.errors import UsageError
from support.commands import LAUNCH, gammaslim, long_run, run
from support.datasets import write_flat

AT_ONCE = 40  # seconds, on a machine that runs other tests too


class Running:
    """A job under way, its files, and how it ends."""

    def __init__(self, output: Path, *command: object, env: dict[str, str] | None = None) -> None:
        self.output = output
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, **(env or {})},
        )  # fmt: skip

    def wait_until_it_trains(self) -> None:
        deadline = time.monotonic() + 240
        while not (self.output / "checkpoints").exists():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.end()
            time.sleep(0.02)

    def ranks(self) -> dict[int, int]:
        """Process number of each rank below the launcher."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environ = dict(
                    entry.split("=", 1) for entry in path.read_text().split("\0") if "=" in entry
                )
                command = (path.parent / "cmdline").read_text()
            except (OSError, UnicodeDecodeError, ValueError):
                continue
            if "RANK" in environ and str(self.output) in command and "-m\0job" in command:
                found[int(environ["RANK"])] = int(path.parent.name)
        return found

    def end(self, seconds: float = 120) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    @property
    def status(self) -> dict[str, object]:
        return json.loads((self.output / "status.json").read_text())


@contextmanager
def running(output: Path, *command: object, env: dict[str, str] | None = None) -> Iterator[Running]:
    job = Running(output, *command, env=env)
    try:
        yield job
    finally:
        ranks = job.ranks()
        if job.process.poll() is None:
            job.process.kill()
            job.process.communicate()
        for pid in ranks.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def job(noise: Path, tmp_path: Path) -> Iterator[Running]:
    """Two processes that train, started by our launcher."""
    with running(tmp_path / "run", *LAUNCH, *long_run(noise, tmp_path / "run")) as started:
        started.wait_until_it_trains()
        yield started


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_wrong_options_are_said_once() -> None:
    done = run(*LAUNCH, "prune", "--rounds", "minus one")
    assert done.code == 2
    assert done.err.count("Invalid value for '--rounds'") == 1
    assert run(*LAUNCH, "inspect", "x").code == 2


def test_errors_keep_their_code_and_are_said_once(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 3, "validation": 2})
    assert run(*LAUNCH, "prune", "--data", tmp_path / "no").code == 66
    (data / "training" / "1_9.png").write_text("no image")
    bad = run(*LAUNCH, "prune", "--data", data, "--output", tmp_path / "run")
    assert bad.code == 65
    assert len(bad.err.splitlines()) == 1
    assert "1_9.png cannot be read" in bad.err
    cuda = run(*LAUNCH, "prune", "--device", "cuda")
    assert (cuda.code, len(cuda.err.splitlines())) == (2, 1), cuda


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "group", "STOP"])
@pytest.mark.sampled(2)
def test_a_stop_request_to_the_launcher_saves_and_ends_with_75(job: Running, how: str) -> None:
    began = time.monotonic()
    if how == "STOP":
        (job.output / "STOP").touch()
    elif how == "group":
        for pid in (job.process.pid, *job.ranks().values()):
            os.kill(pid, signal.SIGTERM)
    else:
        job.process.send_signal(getattr(signal, how))
    code, out, err = job.end()
    assert code == 75, (out, err)
    assert time.monotonic() - began < AT_ONCE
    assert (job.status["state"], job.status["exit_code"]) == ("stopped", 75)
    assert "2 processes" in out
    assert len(err.splitlines()) == 1, err
    assert not (job.output / "lock.json").exists()


def loaders(job: Running) -> list[int]:
    """Processes that read images for the job's ranks, and the servers that they come from."""
    found, new = [], list(job.ranks().values())
    while new:
        paths = (Path(f"/proc/{pid}/task/{pid}/children") for pid in new)
        new = [int(child) for path in paths for child in path.read_text().split()]
        found += [pid for pid in new if "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()]
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_loader_processes_outlive_a_request_but_not_the_job(
    tmp_path: Path, number: signal.Signals
) -> None:
    data = write_flat(tmp_path / "data", {"training": 12, "validation": 6})
    args = (*long_run(data, tmp_path / "run"), "--workers", 2, "--cache", "off")
    with running(tmp_path / "run", *LAUNCH, *args) as job:
        job.wait_until_it_trains()
        processes = loaders(job)
        assert len(processes) >= 2 * (1 + 2)  # of each rank: a server, two for training
        for process in processes:
            variables = Path(f"/proc/{process}/environ").read_text()
            assert all(f"{name}={value}\0" in variables for name, value in PATIENCE.items())
        for rank in job.ranks().values():
            if number == signal.SIGTERM:
                os.killpg(rank, number)  # as torch's agent does it
            else:
                os.kill(rank, number)
        code, out, err = job.end()
        assert code == (75 if number == signal.SIGTERM else 1), (out, err)
        assert err.count("Error:") == 1, err
        assert gone(processes, AT_ONCE)


@pytest.mark.alone
@pytest.mark.parametrize("delay", [0.2, 1.0, 2.0, 3.0])
@pytest.mark.sampled(2)
def test_a_stop_request_before_the_first_step(noise: Path, tmp_path: Path, delay: float) -> None:
    with running(tmp_path / "run", *LAUNCH, *long_run(noise, tmp_path / "run")) as job:
        time.sleep(delay)
        began = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        code, out, err = job.end()
        if delay >= 1:
            assert code == 75, (out, err)
        else:  # Python itself may just have been starting
            assert code in (75, -signal.SIGTERM)
        assert time.monotonic() - began < AT_ONCE
        assert "Traceback" not in err


def test_a_second_interrupt_stops_at_once(job: Running) -> None:
    job.process.send_signal(signal.SIGINT)
    job.process.send_signal(signal.SIGINT)
    code, _, err = job.end(AT_ONCE)
    assert code == 75, err


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_all_end_and_the_reason_comes_first(
    job: Running, noise: Path, victim: int
) -> None:
    ranks = job.ranks()
    os.kill(ranks[victim], signal.SIGKILL)
    began = time.monotonic()
    code, _, err = job.end()
    assert code == 1
    assert time.monotonic() - began < 60
    assert err.splitlines()[0].startswith(f"Error: process {victim} of this node was killed")
    assert gone(list(ranks.values()), 10)
    with running(job.output, *LAUNCH, *long_run(noise, job.output)) as again:
        time.sleep(5)
        again.process.send_signal(signal.SIGTERM)
        assert again.end()[0] == 75  # it is not locked by the dead one


def test_processes_whose_launcher_is_killed_save_and_stop(job: Running) -> None:
    ranks = job.ranks()
    assert sorted(ranks) == [0, 1]
    job.process.kill()
    assert gone(list(ranks.values()), AT_ONCE)
    assert job.status["state"] == "stopped"


@pytest.mark.parametrize(
    "launcher",
    [
        ("accelerate.commands.launch", "--num_processes", 1, "-m", "job"),
        ("accelerate.commands.launch", "--num_processes", 2, "-m", "job"),
        ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "job"),
    ],
    ids=["accelerate", "accelerate with 2", "torchrun"],
)
def test_other_launchers_that_die_of_a_signal_leave_no_orphans(
    noise: Path, tmp_path: Path, launcher: tuple[object, ...]
) -> None:
    command = (sys.executable, "-m", *launcher, *long_run(noise, tmp_path / "run"))
    with running(tmp_path / "run", *command) as job:
        job.wait_until_it_trains()
        job.process.send_signal(signal.SIGUSR1)
        job.end()
        deadline = time.monotonic() + AT_ONCE
        while job.status["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (job.status["state"], job.status["exit_code"]) == ("stopped", 75)
        assert gone(list(job.ranks().values()), AT_ONCE)


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def node(rank: int, port: int, how: str) -> tuple[tuple[object, ...], dict[str, str]]:
    """Launcher and variables of one of two nodes."""
    start = (sys.executable, "-m", "job", "launch", "--nproc", 1)
    if how == "options":
        place = ("--nnodes", 2, "--node-rank", rank, "--master-addr", "127.0.0.1")
        return (*start, *place, "--master-port", port, "--"), {}
    slurm = {
        "SLURM_JOB_ID": str(port - 20000), "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": f"{rank}",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    }  # fmt: skip
    return (*start, "--"), slurm


@pytest.mark.parametrize("how", ["options", "slurm"])
@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.sampled(2)
def test_two_nodes_are_one_world(noise: Path, tmp_path: Path, how: str, end: str) -> None:
    output = tmp_path / "run"
    port = free_port() if how == "options" else 20000 + os.getpid() % 12000
    jobs = []
    for rank in (0, 1):
        launcher, env = node(rank, port, how)
        jobs.append(Running(output, *launcher, *long_run(noise, output), env=env))
    try:
        jobs[0].wait_until_it_trains()
        ranks = jobs[0].ranks()
        if end == "stop":
            jobs[1].process.send_signal(signal.SIGUSR1)  # one node asks for all
        else:
            os.kill(ranks[1], signal.SIGKILL)
        ends = [job.end() for job in jobs]
        expected = [75, 75] if end == "stop" else [1, 1]
        assert [code for code, _, _ in ends] == expected, ends
        assert "2 processes" in ends[0][1]
        assert "Traceback" not in ends[0][2] + ends[1][2]
    finally:
        for job in jobs:
            if job.process.poll() is None:
                job.process.kill()
                job.process.communicate()


def test_threads_are_shared_out_and_a_given_number_is_kept(noise: Path, tmp_path: Path) -> None:
    for given, expected in ((None, max(1, available_cores() // 2)), ("3", 3)):
        env = {} if given is None else {"OMP_NUM_THREADS": given}
        output = tmp_path / f"run {expected}"
        with running(output, *LAUNCH, *long_run(noise, output), env=env) as job:
            job.wait_until_it_trains()
            environ = Path(f"/proc/{job.ranks()[1]}/environ").read_text().split("\0")
            assert f"OMP_NUM_THREADS={expected}" in environ


def test_a_single_process_is_no_different(noise: Path, tmp_path: Path) -> None:
    done = gammaslim("launch", "--", "prune", "--data", noise, "--dry-run")
    assert done.code == 0, done
    assert gammaslim("launch", "prune", "--data", tmp_path / "no").code == 66


SLURM = {
    "SLURM_JOB_ID": "12007", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_NODEID": "2", "SLURM_NNODES": "3",
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1,node2,node3", "node1"), ("gpu[03-05]", "gpu03"), ("a[7,9-10]-ib,b1", "a7-ib"),
        ("rack[1-2]n[3-4]", "rack1n3"), ("login.example.org,x", "login.example.org"),
    ],
)  # fmt: skip
def test_nodes_of_a_slurm_step(nodelist: str, host: str) -> None:
    found = find_nodes({**SLURM, "SLURM_STEP_NODELIST": nodelist})
    assert found == Nodes(3, 2, host, 20007)
    assert find_nodes({**SLURM, "MASTER_PORT": "99"}, address="x") == Nodes(3, 2, "x", 99)


def test_a_launch_for_each_task_of_slurm_is_refused() -> None:
    with pytest.raises(UsageError, match="--ntasks-per-node=1"):
        find_nodes({**SLURM, "SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_NODELIST": "n[1-3]"})
    batch = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert find_nodes(batch) == Nodes()
    assert nodes_left_out(batch) == 2
    assert nodes_left_out(SLURM) == 0


def test_nodes_of_an_indexed_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "slim-1")
    monkeypatch.setattr("socket.getfqdn", lambda: "slim-1.slim.default.svc.cluster.local")
    found = find_nodes({"JOB_COMPLETION_INDEX": "1", "NNODES": "2"})
    assert found == Nodes(2, 1, "slim-0.slim.default.svc.cluster.local", 29500)
    assert find_nodes({"JOB_COMPLETION_INDEX": "1"}) == Nodes()


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"NNODES": "2"}, "--node-rank"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "x"}, "not one of the 2 nodes"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "--master-addr"),
        ({"NNODES": "two"}, "NNODES=two is not a number"),
    ],
)
def test_what_is_missing_is_named(environ: dict[str, str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        find_nodes(environ)
