"""Full, failing and read-only disks: exit 74 or 73 with the path, and the same command goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from job.errors import StorageError
from job.files import append_line
from support.commands import ROOT, Result, clean_environ, run
from support.datasets import write_flat
from support.interrupted_runs import TORCHRUN, assert_same_run, metrics, small_run

FAULTS = ROOT / "tests" / "support" / "workers" / "faults.py"
AGAIN = "run the same command again"
NO_REPORT = "Warning: the report is not written, the job continues: cannot write "
Call = Callable[..., Result]
Mount = Callable[[str], Path]


def options(data: Path, output: Path, *more: object) -> tuple[object, ...]:
    return small_run(data, output, "--model-arg", "base=4", *more)


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Run ``gammaslim`` in a fork of a process that has imported it, with a fault or without."""
    output = tmp_path_factory.mktemp("streams") / "command"
    server = subprocess.Popen(
        [sys.executable, FAULTS],
        env={**clean_environ(), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin
    assert server.stdout

    def command(*args: object, event: str = "", fault: str = "", **where: Any) -> Result:
        request: dict[str, Any] = {"args": list(map(str, args)), "output": str(output)}
        if event:
            request |= {"event": event, "fault": fault, "match": "", "passage": 1, **where}
        print(json.dumps(request), file=server.stdin, flush=True)
        assert select.select([server.stdout], [], [], 180)[0], "the command hangs"
        code = int(server.stdout.readline())
        out, err = (output.with_suffix(e).read_text() for e in (".out", ".err"))
        return Result(subprocess.CompletedProcess(args, code, out, err))

    with server:
        yield command
        server.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(noise: Path, call: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = call(*options(noise, output))
    assert done.code == 0, done
    return output


@pytest.fixture(scope="module")
def interrupted(noise: Path, call: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose disk failed in round 1."""
    output = tmp_path_factory.mktemp("interrupted") / "run"
    where = {"event": "write", "match": r"state\.saf", "passage": 14}
    assert call(*options(noise, output), fault="EIO", **where).code == 74
    return output


def remount(disk: Path, how: str) -> None:
    """Change a mounted file system, as soon as nobody has a file open for writing."""
    command = ["mount", "-o", f"remount,{how}", disk]
    deadline = time.monotonic() + 60
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def mounted(disk: Path, how: str) -> Iterator[Path]:
    """A tmpfs at ``disk``, gone at the end whatever happens."""
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    if os.geteuid():
        pytest.skip("cannot mount: see test_the_same_in_a_user_namespace")
    with mounted(tmp_path / "disk é", "size=64m") as path:
        yield path


if os.geteuid():  # root mounts without a namespace

    def test_the_same_in_a_user_namespace() -> None:
        inside = ("unshare", "--user", "--map-root-user", "--mount")
        done = run(*inside, sys.executable, "-m", "pytest", __file__, cwd=ROOT)
        assert done.code == 0, done


def named(done: Result, output: Path) -> str:
    """The path that the one error on stderr names, relative to the run.

    That the report found no room either is a warning before it.
    """
    assert done.code == 74, done
    *warnings, error = done.err.splitlines()
    assert all(line.startswith(NO_REPORT) for line in warnings), done
    found = re.fullmatch(rf"Error: cannot (?:read|write|write into) (.*): .*; .*{AGAIN}", error)
    assert found, done
    assert ("free some space" in error) == ("No space left" in error or "quota" in error), done
    return found[1].removeprefix(str(output)).lstrip("/")


def assert_intact(output: Path, undisturbed: Path) -> None:
    """All that carries its final name is whole."""
    for name in ("status.json", "summary.json"):
        assert not (output / name).exists() or json.loads((output / name).read_text())
    if (output / "metrics.jsonl").exists():
        content = (output / "metrics.jsonl").read_text()
        assert content[-1:] in ("", "\n")
        assert all(json.loads(line) for line in content.splitlines())
    for model in output.glob("rounds/[0-9]*/model.safetensors"):
        theirs = undisturbed / model.relative_to(output)
        assert model.read_bytes() == theirs.read_bytes()
    for checkpoint in output.glob("checkpoints/[0-9]*"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, entry in manifest.items():
            content = (checkpoint / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]


def assert_goes_on(call: Call, command: tuple[object, ...], undisturbed: Path) -> None:
    output = Path(str(command[command.index("--output") + 1]))
    done = call(*command)
    assert done.code == 0, done
    assert_same_run(output, undisturbed)
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    left = {"config.toml", "metrics.jsonl", "status.json", "summary.json", "rounds", "checkpoints"}
    left |= {"report.html", "figures", "metrics.prom"}
    assert {path.name for path in output.iterdir()} <= left | {"wandb", "wandb.json"}
    assert len(list((output / "checkpoints").iterdir())) == 2


def test_disks_of_many_sizes_fill_up_and_are_extended(
    noise: Path, undisturbed: Path, call: Call, tmp_path: Path, disk: Path
) -> None:
    """The kernel says no wherever it comes to; ``disk`` is only asked for being root."""
    needed = [*undisturbed.glob("*.*"), *undisturbed.glob("[rc]*/*/*")]  # not by the report
    sizes = [f.stat().st_size for f in needed if f.is_file() and f.name != "report.html"]
    total = sum(sizes) // 1024
    hit = set()
    for size in (4, 12, 16, total // 3, 2 * total // 3, total - 70):
        with mounted(tmp_path / "small", f"size={size}k") as small:
            command = options(noise, small / "run")
            full = call(*command)
            hit.add(named(full, small / "run").split("/")[0])
            assert_intact(small / "run", undisturbed)
            remount(small, "size=64m")
            assert_goes_on(call, command, undisturbed)
    assert hit >= {".reserve", "status.json", "checkpoints"}, hit


MOMENTS = [
    ("write", r"config\.toml", 1), ("write", r"reserve", 1), ("write", r"status\.json", 2),
    ("write", r"metrics\.jsonl", 1), ("write", r"metrics\.jsonl", 4),
    ("write", r"state\.safetensors", 1), ("write", r"state\.safetensors", 7),
    ("write", r"position\.json", 2), ("write", r"manifest\.json", 3),
    ("write", r"rounds.*model\.safetensors", 1), ("write", r"rounds.*model\.safetensors", 3),
    ("write", r"rounds.*model\.json", 2), ("write", r"summary\.json", 1),
    ("write", r"summary\.json", 4), ("mkdir", r"checkpoints", 2),
]  # fmt: skip


@pytest.mark.parametrize(("event", "match", "passage"), MOMENTS)
@pytest.mark.sampled(4)
def test_the_disk_is_full_at_a_chosen_moment(
    noise: Path, undisturbed: Path, call: Call, disk: Path, event: str, match: str, passage: int
) -> None:
    command = options(noise, disk / "run")
    full = call(*command, event=event, match=match, passage=passage, fault=f"fill:{disk}")
    assert (disk / "filler").exists(), full
    path = named(full, disk / "run")
    assert event == "mkdir" or re.search(rf"{match}|checkpoints/|rounds/", path)
    assert_intact(disk / "run", undisturbed)
    if "config" not in match and "reserve" not in match:
        status = json.loads((disk / "run" / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("failed", 74)
    if passage > 2:  # a retry too early
        still = call(*command)
        assert still.code == 74, still
        assert_intact(disk / "run", undisturbed)
    (disk / "filler").unlink()
    assert_goes_on(call, command, undisturbed)


def test_a_disk_that_is_full_at_the_end_has_room_for_the_last_status(
    noise: Path, undisturbed: Path, call: Call, disk: Path
) -> None:
    # one at the start, of three rounds, of 24 positions, and the last
    where = {"event": "write", "match": r"status\.json", "passage": 29}
    done = call(*options(noise, disk / "run"), fault=f"fill:{disk}", **where)
    assert done.code == 0, done
    assert (disk / "filler").exists()
    assert_goes_on(call, options(noise, disk / "run"), undisturbed)  # it is only shown
    (disk / "filler").unlink()
    (disk / "run" / "status.json").unlink()  # killed right before it
    assert_goes_on(call, options(noise, disk / "run"), undisturbed)


def test_standard_output_on_a_full_disk(noise: Path, tmp_path: Path) -> None:
    command = ("prune", "--data", noise, "--output", tmp_path / "run", "--wandb", "off")
    shell = ('exec "$@" > /dev/full', "sh", sys.executable, "-m", "job")
    full = run("sh", "-c", *shell, *command, "--base-epochs", 1, "--rounds", 0)
    assert full.code == 74, full
    assert full.err.startswith("Error: cannot read or write standard output"), full
    assert full.err.count("\n") == 1


def test_wandb_on_a_full_disk_neither_hangs_nor_hides_the_reason(
    noise: Path, undisturbed: Path, call: Call, disk: Path
) -> None:
    command = options(noise, disk / "run", "--wandb", "offline")
    full = call(*command, event="write", match=r"wandb\.json", passage=2, fault=f"fill:{disk}")
    assert full.code == 74, full
    assert "Traceback" not in full.err
    assert full.err.splitlines()[-1].startswith(f"Error: cannot write {disk}/run")
    (disk / "filler").unlink()
    assert_goes_on(call, command, undisturbed)


FAILURES = [
    ("fsync", r"config\.toml", 1, "EDQUOT"), ("fsync", r"metrics\.jsonl", 2, "EIO"),
    ("fsync", r"state\.safetensors", 3, "EIO"), ("fsync", r"manifest\.json", 2, "ESTALE"),
    ("fsync", r"checkpoints$", 4, "EIO"), ("fsync", r"rounds$", 1, "ENOSPC"),
    ("rename", r"status\.json", 3, "ESTALE"), ("rename", r"checkpoints/\.[^/]*-", 5, "EIO"),
    ("rename", r"rounds/\.", 2, "EIO"), ("rename", r"summary\.json", 2, "EROFS"),
    ("mkdir", r"rounds", 1, "ENOSPC"), ("mkdir", r"checkpoints/", 3, "EROFS"),
    ("write", r"metrics\.jsonl", 5, "ESTALE"),
]  # fmt: skip


@pytest.mark.parametrize(("event", "match", "passage", "fault"), FAILURES)
@pytest.mark.sampled(4)
def test_a_call_of_the_file_system_fails_once(
    noise: Path, undisturbed: Path, call: Call, tmp_path: Path,
    event: str, match: str, passage: int, fault: str,
) -> None:  # fmt: skip
    command = options(noise, tmp_path / "run")
    failed = call(*command, event=event, match=match, passage=passage, fault=fault)
    named(failed, tmp_path / "run")
    assert_intact(tmp_path / "run", undisturbed)
    assert_goes_on(call, command, undisturbed)


@pytest.mark.parametrize(
    ("match", "fault", "code"),
    [
        (r"config\.toml", "EIO", 74), (r"rounds/00/model\.json", "ESTALE", 74),
        (r"rounds/00/.*safetensors", "EIO", 74), (r"idx3-ubyte", "EREMOTEIO", 74),
        (r"summary\.json", "ESTALE", 74), (r"checkpoints/.*safetensors", "EIO", 0),
    ],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_a_resumed_run_cannot_read(
    noise: Path,
    undisturbed: Path,
    interrupted: Path,
    call: Call,
    tmp_path: Path,
    match: str,
    fault: str,
    code: int,
) -> None:
    """An unreadable checkpoint is passed over as a damaged one is; else nothing is touched."""
    shutil.copytree(interrupted, tmp_path / "run")
    command = options(noise, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    failed = call(*command, event="read", match=match, fault=fault)
    assert failed.code == code, failed
    if code:
        where = noise if "idx3" in match else tmp_path / "run"
        assert re.search(match, named(failed, where))
        assert all(path.read_bytes() == content for path, content in before.items())
    assert_goes_on(call, command, undisturbed)


@pytest.mark.parametrize(
    ("passage", "more"),  # when images are checked, and when they are trained on
    [(1, ()), (1, ("--on-bad-image", "skip")), (2, ("--workers", 0)), (2, ("--workers", 1))],
)
@pytest.mark.sampled(2)
def test_a_image_on_a_failing_disk_is_neither_bad_nor_skipped(
    call: Call, tmp_path: Path, passage: int, more: tuple[object, ...]
) -> None:
    data = write_flat(tmp_path / "data", {"training": 4, "validation": 2})
    where = {"event": "read", "match": r"training/1_2\.png", "passage": passage}
    failed = call(*options(data, tmp_path / "run", *more), fault="ESTALE", **where)
    assert named(failed, data) == "training/1_2.png"


def test_a_file_system_that_goes_read_only_in_the_middle(
    noise: Path, undisturbed: Path, call: Call, disk: Path
) -> None:
    command = options(noise, disk / "run")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "job", *map(str, command)],
        env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        while not list(disk.glob("run/checkpoints/000-0000-*")):
            assert process.poll() is None
            time.sleep(0.001)
        remount(disk, "ro")
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    done = Result(subprocess.CompletedProcess(command, process.returncode, "", errors))
    named(done, disk / "run")
    assert "Read-only file system" in errors
    assert_intact(disk / "run", undisturbed)
    for more in ((), ("--dry-run",)):  # now it is read-only from the start
        refused = call(*command, *more)
        assert refused.code == 73, refused
        assert refused.err.count("\n") == 1
        assert str(disk) in refused.err
    remount(disk, "rw")
    assert_goes_on(call, command, undisturbed)


def test_a_read_only_output_is_refused_before_any_work_and_a_read_only_run_can_be_used(
    noise: Path, call: Call, disk: Path
) -> None:
    command = options(noise, disk / "run")
    assert call(*command).code == 0
    remount(disk, "ro")
    data = ("--data", noise, "--split", "validation")
    for refused in (
        options(noise, disk / "new" / "run"),
        (*options(noise, disk / "new" / "run"), "--dry-run"),
        ("predict", disk / "run", *data, "--output", disk / "new.csv"),
        ("slim", disk / "run", "--output", disk / "new"),
        ("export", disk / "run", "--output", disk / "new.pt"),
    ):
        done = call(*refused)
        assert done.code == 73, done
        assert done.err == f"Error: cannot write into {disk}: Read-only file system\n"
        assert "rate" not in done.out
    for used in (
        command,
        ("evaluate", disk / "run", *data),
        ("inspect", disk / "run"),
        ("predict", disk / "run", *data, "--output", disk.parent / "new.csv"),
    ):
        done = call(*used)
        assert done.code == 0, done


def test_two_processes_on_a_full_disk_end_together(noise: Path, disk: Path) -> None:
    command = options(noise, disk / "run", "--rounds", 0)
    torchrun = (*TORCHRUN, 2, "-m", "job", *command)
    remount(disk, "size=300k")  # a position, and half of the next
    began = time.monotonic()
    full = run(*torchrun, env={"OMP_NUM_THREADS": "1"})
    assert time.monotonic() - began < 120
    assert full.code == 1, full
    assert full.err.count(f"Error: cannot write {disk}/run/checkpoints") == 1
    status = json.loads((disk / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    remount(disk, "size=64m")
    again = run(*torchrun, env={"OMP_NUM_THREADS": "1"})
    assert again.code == 0, again
    assert [m["event"] for m in metrics(disk / "run")].count("epoch") == 2


def test_a_line_is_appended_whole_or_not_at_all(disk: Path) -> None:
    remount(disk, "size=12k")
    path, line = disk / "lines", json.dumps({"event": "x" * 700})
    for _ in range(17):
        append_line(path, line)
    with pytest.raises(StorageError, match="free some space"):  # half of it finds room
        append_line(path, line)
    assert path.read_text().splitlines() == [line] * 17
    assert path.read_text().endswith("\n")
