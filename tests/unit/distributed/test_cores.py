"""Which cores a job may use, and what is set for its threads before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from job.distributed import cores
from job.distributed.cores import PATIENCE, available_cores, given_environ, set_thread_variables

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
