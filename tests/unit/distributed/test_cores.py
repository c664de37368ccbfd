"""Which cores a job may use, and what is set for its threads before torch is imported."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from job.distributed import cores
from job.distributed.cores import PATIENCE, available_cores, given_environ, set_thread_variables
from support.commands import run

VARIABLES = ("OMP_NUM_THREADS", *PATIENCE)
CORES = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(cores, "_set_here", {})


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "1000 100000"}, 1),
        ("0::/", {"cpu.max": "9900000 100000"}, 16),
        ("0::/jobs/7", {"jobs/7/cpu.max": "max 100000", "jobs/cpu.max": "400000 100000"}, 4),
        ("0::/jobs/7", {"jobs/7/cpu.max": "200000 100000", "jobs/cpu.max": "400000 100000"}, 2),
        ("0::/elsewhere", {"cpu.max": "500000 100000"}, 5),  # a container sees its own as the root
        (
            "5:memory:/a\n4:cpu,cpuacct:/b",
            {"cpu/b/cpu.cfs_quota_us": "150000", "cpu/b/cpu.cfs_period_us": "50000"},
            3,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("", {}, 16),
    ],
)
def test_cores_by_affinity_and_the_limits_of_cgroups(
    own: str,
    limits: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, limit in limits.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(limit + "\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert available_cores() == expected


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_a_process_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "available_cores", lambda: 8)
    before = dict(os.environ)
    for local, threads in (("1", "8"), ("3", "2"), ("16", "1"), ("none", "8"), ("0", "8")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        set_thread_variables()
        assert variables() == {"OMP_NUM_THREADS": threads, **PATIENCE}
    set_thread_variables(4)  # the launcher's own share was another
    assert variables() == {"OMP_NUM_THREADS": "2", **PATIENCE}
    assert given_environ() == before | {"LOCAL_WORLD_SIZE": "0"}


@pytest.mark.parametrize("name", PATIENCE)
def test_what_the_user_has_set_wins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    set_thread_variables()
    assert variables() == {"OMP_NUM_THREADS": str(available_cores()), name: "7"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_thread_variables(2)
    assert variables() == {"OMP_NUM_THREADS": "3", name: "7"}


# stands in for torch's import in what the command starts: what the variables are at that moment
WATCH = """
import json, os, sys
from importlib.abc import MetaPathFinder
class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch" and "launch" not in sys.argv[1:2]:
            known = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
            found = {name: os.environ[name] for name in known if name in os.environ}
            os.write(1, (json.dumps(found) + "\\n").encode())
            os._exit(0)
sys.meta_path.insert(0, Finder())
"""
SCRIPT = Path(sys.executable).with_name("gammaslim")
MODULE = (sys.executable, "-m", "job")
SHARED = {"OMP_NUM_THREADS": str(max(1, available_cores() // 2)), **PATIENCE}
ALL = {"OMP_NUM_THREADS": str(available_cores()), **PATIENCE}


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ((SCRIPT, "prune"), {}, [ALL]),
        ((*MODULE, "prune"), {}, [ALL]),
        ((*MODULE, "prune"), {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "1"}, []),
        ((*MODULE, "evaluate", "x", "--data", "x"), {"GOMP_SPINCOUNT": "5"}, []),
        ((*MODULE, "inspect", "x"), {}, [ALL]),
        ((*MODULE, "prune"), {"RANK": "1", "LOCAL_WORLD_SIZE": "2"}, [SHARED]),
        ((*MODULE, "launch", "--nproc", "1", "--", "prune"), {}, [ALL]),
        ((*MODULE, "launch", "--nproc", "2", "--", "prune"), {}, [SHARED, SHARED]),
    ],
)
def test_variables_are_set_before_torch_is_imported(
    command: tuple[object, ...],
    given: dict[str, str],
    expected: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    done = run(*command, env={"PYTHONPATH": str(tmp_path), **given}, cwd=tmp_path)
    assert done.code == 0, done
    found = [json.loads(line) for line in done.out.splitlines()]
    if not expected:
        threads = {"OMP_NUM_THREADS": str(available_cores())}
        expected = [threads | given]
    assert found == expected, done
