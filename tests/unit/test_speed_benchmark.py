"""The benchmarks of speed and memory measure what they say, on very little data."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.commands import ROOT

FOLDER = ROOT / "tests" / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name: str) -> Any:
    return importlib.import_module(name)


def test_memory_counts_all_processes_and_shared_pages_once() -> None:
    tree = module("process_tree")
    hold = "import os, sys; held = b'x' * (64 << 20); {}; print(flush=True); sys.stdin.read(1)"
    used = []
    for more, count in (("pass", 1), ("os.fork()", 2)):
        command = [sys.executable, "-c", hold.format(more)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            for _ in range(count):
                process.stdout.readline()  # each process is there
            pids = tree.process_tree(process.pid)
            assert len(pids) == count
            used.append([tree.proportional_memory(pid) >> 20 for pid in pids])
    alone, shared = used
    assert 64 < sum(alone) < 90
    assert sum(shared) < sum(alone) + 15
    assert max(shared) < sum(alone) - 20


def test_memory_is_sampled_to_the_end_of_a_command() -> None:
    hold = "import time; held = b'x' * (64 << 20); time.sleep(1)"
    usage = module("process_tree").measure([sys.executable, "-c", hold])
    assert usage.code == 0
    assert 64 < usage.peak >> 20 < 90
    assert usage.largest == usage.peak
    assert max(size for second, size in usage.samples if second > 0.5) >> 20 > 64
    assert usage.at(0) == usage.samples[0][1]
    assert 1 < usage.seconds < 60


def test_photographs_are_written_once(tmp_path: Path) -> None:
    photos = module("photos")
    folder = photos.write_photos(tmp_path / "data", 12, 2, width=64, height=48)
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 14
    before = [file.stat().st_mtime_ns for file in files]
    photos.write_photos(folder, 12, 2, width=64, height=48)
    assert [file.stat().st_mtime_ns for file in files] == before
    photos.draw_photo(photos.np.random.default_rng(0), 512, 490).save(
        tmp_path / "a.jpg", quality=90
    )
    assert 50_000 < (tmp_path / "a.jpg").stat().st_size < 110_000


def test_a_table_has_its_conditions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditions = module("conditions")
    found = conditions.conditions()
    assert {"torch", "date", "processor", "cores", "load"} <= found.keys()
    rows = [{"what": "a", "images/s": 1234.5}, {"what": "b", "ratio": 0.5}]
    conditions.publish("Title", rows, found | {"load": 99.0}, tmp_path / "a.json")
    printed = capsys.readouterr()
    assert "1,234" in printed.out
    assert "do not publish" in printed.err
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["rows"] == rows
    assert content["conditions"]["torch"] == found["torch"]


@pytest.mark.parametrize("kind", ["homework-epoch", "homework-step", "job-epoch", "job-step"])
def test_a_turn_counts_its_images(tmp_path: Path, kind: str) -> None:
    data = module("photos").write_photos(tmp_path / "data", 33, 2, width=64, height=48)
    worker = module("speed_worker")
    small = ("--size", "32", "--images", "33", "--steps", "2", "--workers", "0")
    args = worker.parse([kind, "--data", str(data), *small])
    turn = worker.turn_of(args)
    assert turn() == (33 if kind.endswith("epoch") else 64)
    if kind == "job-epoch":
        assert args.idle > 0  # the evaluation, which does not count


def test_the_checks_of_a_gpu_can_be_imported_without_one() -> None:
    checks = " ".join(vars(module("gpu_checks")))
    for name in ("autocast", "fused", "pinned", "nccl", "proven", "compensation", "compiled"):
        assert name in checks, name
