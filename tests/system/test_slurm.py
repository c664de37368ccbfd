"""slurm/prune.sh and slurm/sweep.sh on a real Slurm cluster of two nodes, which runs here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.commands import ROOT, run
from support.datasets import write_noise_idx
from support.slurm.cluster import Cluster, Job, has_freezer

VENV = Path(sys.executable).parent.parent
PRUNE, SWEEP = ROOT / "slurm" / "prune.sh", ROOT / "slurm" / "sweep.sh"
SCRIPTS = [
    PRUNE,
    SWEEP,
    ROOT / "tests" / "run.sh",
    ROOT / ".ci" / "run",
    *ROOT.glob("tests/**/*.sh"),
]

NETWORK = """
import os, time
from torch import nn

class Network(nn.Sequential):
    def forward(self, images):
        if self.training and images.device.type == "cpu":  # not when it is only analysed
            time.sleep(float(os.environ.get("PAUSE", 0)))  # so that a test can act in time
        return super().forward(images)

def tiny(num_classes):
    layers = []
    for before, after in ((3, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, 3, 2), nn.BatchNorm2d(after), nn.ReLU()]
    return Network(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""


class Batch:
    """Jobs of one cluster, from a folder that all nodes share, with a network and data in it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "nets.py").write_text(NETWORK)
        write_noise_idx(folder / "data" / "idx", 48, 20)

    def submit(
        self, *options: object, sbatch: tuple[object, ...] = (), pause: float = 0,
        script: Path = PRUNE, **env: object,
    ) -> str:  # fmt: skip
        job = (
            *options, "--data", "data/idx", "--model", "nets:tiny", "--base-epochs", 6,
            "--epochs", 2, "--batch-size", 16, "--workers", 0, "--device", "cpu",
            "--checkpoint-every", 1000, "--wandb", "off",
        )  # fmt: skip
        rounds = () if "--rounds" in options else ("--rounds", 1)
        given = {"SLIM_VENV": VENV, "PAUSE": pause, **env}
        return self.cluster.submit(
            *sbatch, script, *job, *rounds, cwd=self.folder,
            env={key: str(value) for key, value in given.items()},
        )  # fmt: skip

    def log(self, job: str) -> str:
        path = self.folder / f"gammaslim-{job}.out"
        return path.read_text() if path.exists() else ""

    def until(self, job: str, text: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log(job):
            assert time.monotonic() < deadline, (text, self.log(job))
            time.sleep(0.05)

    def run_folder(self, job: str) -> Path:
        return self.folder / "runs" / f"slurm-{job}"

    def weights(self, job: str) -> list[str]:
        files = sorted(self.run_folder(job).glob("rounds/*/model.safetensors"))
        assert len(files) == 2, self.log(job)
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def events(self, job: str, kind: str) -> list[dict[str, object]]:
        lines = (self.run_folder(job) / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == kind]

    def status(self, job: str) -> dict[str, object]:
        return json.loads((self.run_folder(job) / "status.json").read_text())

    def finished(self, job: str, *, restarts: int = 0) -> Job:
        """Wait for the job; it must have ended well, after just so many restarts."""
        end = self.cluster.wait(job)
        assert end.state == "COMPLETED", (end, self.log(job))
        assert (end["ExitCode"], int(end["Restarts"])) == ("0:0", restarts)
        assert self.status(job)["state"] == "finished"
        return end

    def ended(self, job: str, state: str, code: int, *, restarts: int = 0) -> str:
        """Wait for the job to end so, and stay so; its log."""
        end = self.cluster.wait(job)
        time.sleep(1)  # a requeue would come now
        end = self.cluster.job(job)
        assert (end.state, int(end["Restarts"])) == (state, restarts), (end, self.log(job))
        if state == "FAILED":
            assert end["ExitCode"] == f"{code}:0"
        return self.log(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a cluster of its own mounts and makes devices: that wants root")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def batch(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return Batch(cluster, tmp_path_factory.mktemp("shared é"))


@pytest.fixture(scope="module")
def short_of_time(batch: Batch) -> str:
    """A job whose time limit comes long before its end; the other tests run meanwhile."""
    return batch.submit(sbatch=("--time", 2, "--signal", "B:USR1@30"), pause=8)


@pytest.fixture(scope="module")
def undisturbed(batch: Batch, short_of_time: str) -> dict[int, list[str]]:
    """The weights of runs that nothing happens to, by the number of nodes."""
    assert short_of_time  # it began before these
    jobs = {nodes: batch.submit(sbatch=("--nodes", nodes)) for nodes in (1, 2)}
    for nodes, job in jobs.items():
        batch.finished(job)
        processes = "1 process" if nodes == 1 else "2 processes"
        assert f"{batch.run_folder(job)} on {processes}, cpu" in batch.log(job)
    return {nodes: batch.weights(job) for nodes, job in jobs.items()}


def test_processes_are_tracked_as_on_real_clusters(cluster: Cluster) -> None:
    tracking = re.search(r"ProctrackType\s*= (\S+)", cluster.run("scontrol", "show", "config"))
    assert tracking
    assert tracking[1] == ("proctrack/cgroup" if has_freezer() else "proctrack/linuxproc")


def test_one_node_and_two_train_as_one_world(undisturbed: dict[int, list[str]]) -> None:
    assert set(undisturbed) == {1, 2}


def test_a_job_warned_and_one_requeued_from_outside_end_with_the_same_weights(
    batch: Batch, undisturbed: dict[int, list[str]]
) -> None:
    requeued = batch.submit(pause=0.4)
    warned = batch.submit(sbatch=("--nodes", 2), pause=0.4)
    batch.until(requeued, "rate 1.0000 epoch   1")
    batch.cluster.run("scontrol", "requeue", requeued)
    batch.until(warned, "rate 1.0000 epoch   1")
    # as Slurm does it before the time limit
    batch.cluster.run("scancel", "--signal=USR1", "--batch", warned)
    for job, nodes in ((requeued, 1), (warned, 2)):
        batch.finished(job, restarts=1)
        assert batch.log(job).count("slurm: job ") == 2  # one log
        assert batch.events(job, "resume")
        assert batch.weights(job) == undisturbed[nodes]
        assert not (batch.run_folder(job) / "STOP").exists()
    assert "stopped by USR1, saved; the job is requeued" in batch.log(warned)
    assert batch.log(warned).count("on 2 processes, cpu") == 2
    assert "the job is requeued" not in batch.log(requeued)  # Slurm did it


def test_wrong_options_end_the_job_with_their_code(batch: Batch) -> None:
    bad = batch.submit("--rounds", "minus", sbatch=("--nodes", 2))
    missing = batch.submit("--weights", "none.pt")
    log = batch.ended(bad, "FAILED", 2)
    assert "Invalid value for '--rounds'" in log
    assert not batch.run_folder(bad).exists()
    assert "none.pt" in batch.ended(missing, "FAILED", 66)


def test_a_stop_by_hand_is_not_undone_and_requeues_are_limited(batch: Batch) -> None:
    tasks = ("--ntasks-per-node", 2, "--cpus-per-task", 3)
    by_hand = batch.submit("--output", "here/by hand", sbatch=tasks, pause=0.4)
    limited = batch.submit(pause=0.4, SLIM_MAX_REQUEUES=0)
    batch.until(by_hand, "rate 1.0000 epoch   0")
    (batch.folder / "here" / "by hand" / "STOP").touch()
    batch.until(limited, "rate 1.0000 epoch   0")
    batch.cluster.run("scancel", "--signal=USR1", limited)  # to the step alone
    log = batch.ended(by_hand, "FAILED", 75)
    assert "stopped by here/by hand/STOP" in log
    assert "on 2 processes, cpu" in log  # as many as tasks were asked for
    assert r"slurm/prune.sh --output here/by\ hand --output here/by\ hand --data data/idx" in log
    log = batch.ended(limited, "FAILED", 75)
    assert "already restarted 0 times" in log
    assert batch.status(limited)["state"] == "stopped"


def test_before_its_time_limit_a_job_is_requeued_and_a_cancelled_one_is_not(
    batch: Batch, cluster: Cluster, short_of_time: str
) -> None:
    job = short_of_time
    cluster.wait(job, ["RUNNING"], restarts=1)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    assert "stopped by USR1, saved; the job is requeued" in batch.log(job)
    assert "DUE TO TIME LIMIT" not in batch.log(job)
    deadline = time.monotonic() + 300
    while batch.status(job)["state"] != "running":
        assert time.monotonic() < deadline, batch.log(job)
        time.sleep(0.1)
    assert batch.events(job, "resume")
    restarts = int(cluster.job(job)["Restarts"])
    cluster.run("scancel", job)
    batch.until(job, "Slurm has ended the job")  # the script ends later than the job
    batch.ended(job, "CANCELLED", 75, restarts=restarts)
    after = batch.status(job)
    assert (after["state"], after["exit_code"]) == ("stopped", 75)


def test_gpus_may_lie_unevenly_and_a_busy_port_is_passed_over(batch: Batch) -> None:
    newest = max(int(job) for job in re.findall(r"JobId=(\d+)", batch.cluster.show("job", "")))
    port = 20000 + (newest + 1) % 12000
    listen = f"import socket, sys; s = socket.create_server(('', {port})); print(1, flush=True); "
    with batch.cluster.start_process(sys.executable, "-c", f"{listen}sys.stdin.read()") as other:
        assert other.stdout
        assert other.stdout.readline()
        job = batch.submit(sbatch=("--nodes", 2, "--gpus", 3))
        assert int(job) == newest + 1
        batch.finished(job)
        other.communicate()
    log = batch.log(job)
    assert "on 3 processes, cpu" in log
    assert "Slurm gave 2 GPUs of alpha to this job, torch sees 0" in log


def test_an_array_has_a_run_for_each_value_and_one_table(batch: Batch, cluster: Cluster) -> None:
    env = {"SLIM_PRUNE": PRUNE, "script": SWEEP}
    job = batch.submit("rate", 0.9, 0.5, "--", sbatch=("--array", "0-1"), pause=0.4, **env)
    batch.until(f"sweep-{job}_1", "rate 1.0000 epoch   1")
    cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_1")  # it alone, and it goes on
    for task, restarts in enumerate(("0", "1")):
        end = cluster.wait(f"{job}_{task}")
        log = batch.log(f"sweep-{job}_{task}")
        assert (end["ExitCode"], end["Restarts"]) == ("0:0", restarts), (end, log)
        assert f"bash slurm/sweep.sh --merge {batch.folder}/runs/sweep-{job}\n" in log
    sweep = batch.folder / "runs" / f"sweep-{job}"
    assert sorted(path.name for path in sweep.iterdir()) == ["rate-0.5", "rate-0.9"]
    merged = run("bash", SWEEP, "--merge", sweep, env={"SLIM_VENV": str(VENV)})
    assert merged.code == 0, merged
    rows = [line.split() for line in merged.out.splitlines()]
    for row, rate in zip(rows[1:3], ("0.5", "0.9"), strict=True):
        summary = json.loads((sweep / f"rate-{rate}" / "summary.json").read_text())
        chosen = [summary["base"], *summary["rounds"]][int(summary["recommended"][-2:])]
        assert row[:2] == [f"rate-{rate}", "finished"]
        assert row[3] == f"{chosen['params']:,}"


def test_when_nodes_lose_their_power_the_job_ends_with_the_same_weights(
    batch: Batch, cluster: Cluster, undisturbed: dict[int, list[str]]
) -> None:
    job = batch.submit(sbatch=("--nodes", 2), pause=0.4)
    for restarts, node in enumerate(("beta", "alpha"), start=1):  # alpha runs the script itself
        batch.until(job, f"rate 1.0000 epoch   {2 * restarts}")
        cluster.power_off(node)
        cluster.wait(job, ["PENDING"], restarts=restarts)
        cluster.power_on(node)
    batch.finished(job, restarts=2)
    assert batch.log(job).count("on 2 processes, cpu") == 3
    assert len(batch.events(job, "resume")) == 2
    assert batch.weights(job) == undisturbed[2]


Golden = Callable[..., tuple[int, list[str], str]]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
SRUN = """#!/usr/bin/env bash
[ "${@: -1}" != true ] || exit "${ANSWER:-0}"
printf '%s\\n' "$@" >>"$RECORD"
exit "${CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
[ -n "$STATE" ] || exit 1
[ "$1" != requeue ] || echo "requeue $2" >>"$RECORD"
echo "JobId=7 JobState=$STATE Reason=None"
"""


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    """Run prune.sh with recorders in place of srun and scontrol, as in a job of one node."""
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(*args: str, **env: str) -> tuple[int, list[str], str]:
        record = tmp_path / "record"
        record.write_text("")
        done = subprocess.run(
            ["bash", PRUNE, *args], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "RECORD": str(record), **JOB, **env},
        )  # fmt: skip
        return done.returncode, record.read_text().splitlines(), done.stdout + done.stderr

    return start


def after(words: list[str], first: str) -> list[str]:
    return words[words.index(first) :]


def test_containers_are_chosen_by_one_variable(golden: Golden, tmp_path: Path) -> None:
    """What srun would be told; neither Apptainer nor pyxis is here to run it."""
    job = ["launch", "--nnodes", "1", "--", "prune", "--output", f"{tmp_path}/runs/slurm-7"]
    code, words, _ = golden(
        "--rate", "0.9", SLIM_CONTAINER="apptainer:/s/x.sif", SLIM_BIND="/d:/d:ro"
    )
    bind = ["--bind", f"{tmp_path},/d:/d:ro", "--pwd", f"{tmp_path}"]
    expected = ["apptainer", "exec", *bind, "/s/x.sif", "gammaslim", *job, "--rate", "0.9"]
    assert (code, after(words, "apptainer")) == (0, expected)
    _, words, _ = golden(SLIM_CONTAINER="apptainer:/s/x.sif", SLURM_GPUS_ON_NODE="2")
    assert after(words, "--nv") == ["--nv", "/s/x.sif", "gammaslim", *job]
    _, words, _ = golden(SLIM_CONTAINER="pyxis:nvcr.io#a/b:1", SLIM_BIND="/d:/d:ro")
    assert after(words, "--container-image=nvcr.io#a/b:1") == [
        "--container-image=nvcr.io#a/b:1", f"--container-mounts={tmp_path}:{tmp_path},/d:/d:ro",
        f"--container-workdir={tmp_path}", "--no-container-mount-home", "gammaslim", *job,
    ]  # fmt: skip
    code, _, said = golden(SLIM_CONTAINER="docker:x")
    assert (code, "neither apptainer:FILE nor pyxis:IMAGE" in said) == (78, True)


def test_what_the_site_does_not_have_is_said(golden: Golden, tmp_path: Path) -> None:
    code, words, said = golden()
    assert (code, words) == (78, [])
    assert "set SLIM_VENV" in said
    own = tmp_path / ".venv" / "bin" / "gammaslim"
    own.parent.mkdir(parents=True)
    own.symlink_to(VENV / "bin" / "gammaslim")
    code, words, _ = golden(VIRTUAL_ENV="/nowhere")  # an activated one without gammaslim
    assert (code, ".venv/bin/gammaslim" in words) == (0, True)
    assert golden(SLIM_VENV="/nowhere")[0] == 78
    # no scontrol, or not allowed to requeue
    code, _, said = golden("--lr", "1e-2", SLIM_VENV=str(VENV), CODE="75")
    assert code == 75
    assert f"slurm/prune.sh --output {tmp_path}/runs/slurm-7 --lr 1e-2\n" in said
    assert run("bash", PRUNE).code == 2
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "7"}
    sweep = run("bash", SWEEP, "rate", 0.9, 0.8, "--", "--data", "d", env={**JOB, **task})
    assert sweep.code == 2
    assert "2 values want sbatch --array=0-1" in sweep.err
    assert run("bash", SWEEP).code == 2


@pytest.mark.parametrize(
    ("code", "nodes", "answer", "state", "requeued"),
    [
        (75, 1, 0, "RUNNING", True), (75, 1, 0, "CANCELLED", False), (75, 2, 0, "PENDING", False),
        (1, 2, 1, "RUNNING", True),  # the other node does not answer
        (1, 2, 0, "RUNNING", False), (1, 1, 1, "RUNNING", False), (137, 2, 1, "RUNNING", True),
        (65, 2, 1, "RUNNING", False), (74, 2, 1, "RUNNING", False), (1, 2, 1, "PENDING", False),
    ],
)  # fmt: skip
def test_what_is_requeued(
    golden: Golden, code: int, nodes: int, answer: int, state: str, requeued: bool
) -> None:
    job = {"SLURM_JOB_NUM_NODES": f"{nodes}", "SLIM_VENV": str(VENV)}
    ended, words, said = golden(CODE=f"{code}", ANSWER=f"{answer}", STATE=state, **job)
    assert ended == code
    assert ("requeue 7" in words) == requeued, said
    assert ("the job is requeued" in said) == requeued


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(script: Path) -> None:
    tools = VENV / "bin"
    for command in (
        (tools / "shellcheck", "-S", "style"),
        (tools / "shfmt", "-d", "-i", "2", "-ci"),
    ):
        done = run(*command, script)
        assert done.code == 0, done.out
