"""``--output s3://…`` on a real S3 server, which is killed, paused, and refuses keys.

And ``gs://…`` on a server of Google Cloud Storage.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from support.cloud_server import CloudServer
from support.commands import ROOT, Result, clean_environ, run
from support.interrupted_runs import assert_same_run, small_run
from support.object_server import ACCESS, BUCKET, SECRET, ObjectServer

Server = ObjectServer | CloudServer

# the command with less patience at its end
HASTY = """
import sys
from job.artifacts import stored_output
stored_output.STORE_PATIENCE = 1.0
from job.__main__ import main
sys.exit(main())
"""

# the command, killed when its first position is in the store: the manifest is written last
SUDDEN = """
import os, signal, sys
from job.artifacts.object_store import Store
put = Store.put
def put_and_die(store, path, name):
    put(store, path, name)
    if name.startswith("checkpoints/") and name.endswith("/manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)
Store.put = put_and_die
from job.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def undisturbed(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    one_thread = {"OMP_NUM_THREADS": "1"}
    done = run(sys.executable, "-m", "job", *options(noise, output), env=one_thread)
    assert done.code == 0, done
    return output


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    server = ObjectServer(tmp_path_factory.mktemp("s3"))
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudServer]:
    server = CloudServer(tmp_path / "gs")
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    try:
        yield server
    finally:
        server.kill()


def options(data: object, output: object, *more: object) -> tuple[object, ...]:
    cut = ("--importance", "gamma", "--compensate", "none", "--workers", 0)
    brief = ("--base-epochs", 1, "--rounds", 1)
    return small_run(data, output, "--model-arg", "base=4", *brief, *cut, *more)  # type: ignore[arg-type]


def environ(server: Server, machine: Path, **more: str) -> dict[str, str]:
    """The environment of a job on a machine with the scratch folder ``machine``."""
    machine.mkdir(exist_ok=True)
    return {**server.environ, "TMPDIR": str(machine), "OMP_NUM_THREADS": "1", **more}


def begin(
    server: Server, machine: Path, *args: object, program: tuple[str, ...] = ("-m", "job")
) -> Started:
    return Started(
        [sys.executable, *program, *map(str, args)], {**clean_environ(), **environ(server, machine)}
    )


class Started:
    """A job that runs."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> Result:
        out, err = self.process.communicate(timeout=120)
        command = subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)
        return Result(command)


def wait_for(server: Server, pattern: str, job: Started) -> None:
    """Wait until the store has a file whose name matches ``pattern``."""
    files, until = server.files(), time.monotonic() + 60
    while not any(fnmatch(path, pattern) for path in files.find(BUCKET)):
        assert time.monotonic() < until
        assert job.process.poll() is None, job.end()
        time.sleep(0.1)


def test_a_killed_run_goes_on_from_the_store_on_another_machine(
    noise: Path, undisturbed: Path, server: ObjectServer, tmp_path: Path
) -> None:
    url, done = kill_and_go_on(server, noise, undisturbed, tmp_path)
    assert SECRET not in done.out + done.err
    lineage = json.loads((tmp_path / "fetched/rounds/01/model.json").read_text())["lineage"]
    assert lineage["run"] == url
    for path in (tmp_path / "fetched").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_a_killed_run_goes_on_from_google_cloud_storage(
    noise: Path, undisturbed: Path, cloud: CloudServer, tmp_path: Path
) -> None:
    kill_and_go_on(cloud, noise, undisturbed, tmp_path)


def kill_and_go_on(
    server: Server, noise: Path, undisturbed: Path, tmp_path: Path
) -> tuple[str, Result]:
    """Kill a job after its first save; a job elsewhere ends with the files of ``undisturbed``."""
    server.files().put(str(noise), f"{BUCKET}/noise", recursive=True)
    url = f"{server.scheme}://{BUCKET}/runs/killed"
    args = options(f"{server.scheme}://{BUCKET}/noise", url)
    job = begin(server, tmp_path / "a", *args, program=("-c", SUDDEN))
    assert job.end().code == -signal.SIGKILL
    shutil.rmtree(tmp_path / "a")
    elsewhere = environ(server, tmp_path / "b")
    status = run(sys.executable, "-m", "job", "status", url, "--json", env=elsewhere)
    (line,) = json.loads(status.out)["runs"][0]["next"]
    _, *args = shlex.split(line)
    assert [a for a in args if "/" in a] == [f"{url}/config.toml", url, args[-1]]
    assert args[-1] == f"{server.scheme}://{BUCKET}/noise"
    done = run(sys.executable, "-m", "job", *args, env=elsewhere)
    assert done.code == 0, done
    assert "fetching" in done.out
    assert f"all files are in {url}\n" in done.out
    assert f"next: gammaslim evaluate {url}\n" in done.out  # without a test split
    server.files().get(f"{BUCKET}/runs/killed", str(tmp_path / "fetched"), recursive=True)
    assert_same_run(tmp_path / "fetched", undisturbed)
    assert '"event": "resume"' in (tmp_path / "fetched" / "metrics.jsonl").read_text()
    return url, done


def test_a_run_outlives_a_server_that_pauses_and_dies_and_is_stored_later(
    noise: Path, undisturbed: Path, server: ObjectServer, tmp_path: Path
) -> None:
    args = options(noise, f"s3://{BUCKET}/runs/unplugged")
    job = begin(server, tmp_path / "a", *args, program=("-c", HASTY))
    wait_for(server, "*unplugged/config.toml", job)
    server.send(signal.SIGSTOP)
    time.sleep(1)
    server.send(signal.SIGCONT)
    server.kill()
    done = job.end()
    assert done.code == 74, done
    assert "does not respond" in done.err
    assert "run the same command again on this machine" in done.err
    assert "recommended: rounds/" in done.out
    assert "stored in" not in done.out
    assert SECRET not in done.out + done.err
    server.start()
    done = run(sys.executable, "-m", "job", *args, env=environ(server, tmp_path / "a"))
    assert done.code == 0, done
    assert "the run is finished and only shown" in done.out
    server.files().get(f"{BUCKET}/runs/unplugged", str(tmp_path / "fetched"), recursive=True)
    assert_same_run(tmp_path / "fetched", undisturbed)


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "a-wrong-key"}, 73),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nonexistent"}, 73),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 74),
    ],
)
def test_a_store_that_cannot_be_used_ends_the_job_before_it_trains(
    noise: Path, server: ObjectServer, tmp_path: Path, keys: dict[str, str], code: int
) -> None:
    args = options(noise, f"s3://{BUCKET}/runs/refused")
    done = run(sys.executable, "-m", "job", *args, env=environ(server, tmp_path / "a", **keys))
    assert done.code == code, done
    assert done.err.startswith("Error: s3://bucket/runs/refused ")
    assert len(done.err.splitlines()) == 1
    for secret in (SECRET, ACCESS, "a-wrong-key"):
        assert secret not in done.out + done.err
    assert "epoch" not in done.out


def test_a_bucket_that_does_not_exist_is_named(
    noise: Path, server: ObjectServer, tmp_path: Path
) -> None:
    args = options(noise, "s3://no-such-bucket/runs/a", "--dry-run")
    done = run(sys.executable, "-m", "job", *args, env=environ(server, tmp_path / "a"))
    assert done.code == 73, done
    assert "s3://no-such-bucket/runs/a refuses access" in done.err
    assert os.listdir(tmp_path / "a")
