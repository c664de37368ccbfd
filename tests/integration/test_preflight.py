"""``prune --dry-run``: what it finds before a queue is waited for, all in one go."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from job.artifacts.json_records import from_json
from job.artifacts.records import SummaryRecord
from job.artifacts.run_folder import default_output
from job.config import PruneConfig
from job.data.layout import open_data
from job.errors import GammaslimError, StorageError
from job.files import read_json
from job.pipeline import resources, wandb_check
from job.pipeline.resources import batch_warnings, check_disk, core_warnings, space_needed
from job.pipeline.wandb_check import WandbAnswer
from support.commands import gammaslim, run
from support.datasets import write_flat
from support.wandb_server import KEY, WandbServer

NO_KEY = {"NETRC": "/dev/null", "HOME": "/nonexistent"}


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Error: ")]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 3, "validation": 2})
    (data / "training" / "1_9.png").write_text("no image")
    (tmp_path / "file").write_text("no folder")
    torch.save({"a": torch.zeros(1)}, tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:200])
    done = gammaslim(
        "prune", "--dry-run", "--data", data, "--weights", tmp_path / "half.pt",
        "--output", tmp_path / "file" / "run", "--wandb", "online", env=NO_KEY,
    )  # fmt: skip
    assert done.code == 65, done
    said = errors(done.err)
    assert len(said) == len(done.err.splitlines()) == 4
    for part in ("1_9.png cannot be read", "half.pt", "file: it is not a folder", "no API key"):
        assert sum(part in line for line in said) == 1, part
    assert "1_9.png" in said[-1]  # the last line's is the exit code
    assert "all is well" not in done.out


def test_what_the_data_is_needed_for_is_found_too(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 11, "validation": 2})
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    common = ("prune", "--dry-run", "--data", data, "--workers", 200, "--batch-size", 32)
    wrong = gammaslim(*common, "--weights", tmp_path / "other.pt", env=NO_KEY)
    assert wrong.code == 65, wrong
    assert "other.pt" in errors(wrong.err)[0]
    target = gammaslim(*common, "--target", "params=10", "--min-keep", 0.5, env=NO_KEY)
    assert target.code == 2, target
    assert len(errors(target.err)) == 1
    for done in (wrong, target):
        assert "with 200 loader processes each, 201 are recommended" in done.err
        assert "the last batch of an epoch has only 1 of 32 images" in done.err


def test_on_several_processes_all_is_said_once(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 5, "validation": 2})
    launch = (sys.executable, "-m", "job", "launch", "--nproc", 2, "--", "prune", "--dry-run")
    done = run(*launch, "--data", data, "--batch-size", 5, env=NO_KEY)
    assert done.code == 0, done
    assert "--batch-size 5 over 2 processes gives some 2 and some 3" in done.err
    assert done.out.count("disk: the run needs about") == done.out.count("all is well") == 1
    assert done.out.count("W&B: offline, since no API key is configured") == 1
    bad = run(*launch, "--data", tmp_path / "no", "--wandb", "online", env=NO_KEY)
    assert bad.code == 66, bad
    assert len(errors(bad.err)) == len(bad.err.splitlines()) == 2


def test_the_disk_is_compared_with_what_a_run_takes(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = from_json(SummaryRecord, read_json(finished_run / "summary.json")).entries
    used = sum(file.stat().st_size for file in finished_run.rglob("*") if file.is_file())
    needed = space_needed(PruneConfig(), planned)
    assert used < needed < 4 * used
    assert space_needed(PruneConfig(optimizer="sgd", wandb="off"), planned) < needed
    left = type("Usage", (), {"free": needed})
    monkeypatch.setattr("shutil.disk_usage", lambda _: left)
    check_disk(PruneConfig(), planned, finished_run)
    assert f"about {needed / 1e6:.2g} MB, {needed / 1e6:.2g} MB is free" in capsys.readouterr().out
    left.free = needed - 1
    with pytest.raises(StorageError, match=f"has {needed - 1:,} bytes free.* about {needed:,}"):
        check_disk(PruneConfig(), planned, finished_run)


@pytest.mark.parametrize(
    ("behaviour", "key", "kind", "problem"),
    [
        ("answer", KEY, None, ""),
        ("answer", KEY[::-1], "key", "Failed to authenticate with"),
        ("answer", "abc", "key", "must have 40+ characters"),
        ("answer", "", "none", ""),
        ("500", KEY, "server", "answers with status 500"),
        ("reset", KEY, "server", "cannot be reached"),
        ("hang", KEY, "server", "cannot be reached: timed out"),
    ],
)
@pytest.mark.sampled(2)
def test_the_key_is_tried(
    monkeypatch: pytest.MonkeyPatch, behaviour: str, key: str, kind: str | None, problem: str
) -> None:
    for name, value in NO_KEY.items():
        monkeypatch.setenv(name, value)
    with WandbServer(behaviour) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", key)
        answer = wandb_check.ask_wandb()
    assert answer.kind == kind
    assert answer.server == server.url
    assert problem in answer.problem
    assert answer.user == (None if kind else "someone")
    assert not key or key not in str(answer)


def test_a_key_in_netrc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with WandbServer() as server:
        host = server.url.removeprefix("http://")
        content = f"machine {host}\n  login user\n  password {KEY}\n"
        (tmp_path / "netrc").write_text(content)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_MODE", "offline")  # --wandb online wins over it
        assert wandb_check.ask_wandb() == WandbAnswer(server.url, "someone")
    assert (tmp_path / "netrc").read_text() == content


@pytest.mark.parametrize(
    ("mode", "env", "answer", "code", "warned", "said"),
    [
        ("auto", "", WandbAnswer(kind="none"), None, False, "offline, since"),
        ("auto", "online", WandbAnswer(kind="none"), None, True, ""),
        ("auto", "", WandbAnswer(kind="key", problem="x does not take"), None, True, ""),
        ("auto", "", WandbAnswer(kind="server", problem="x cannot be"), None, True, ""),
        ("auto", "offline", None, None, False, "W&B: offline, by WANDB_MODE"),
        ("online", "offline", WandbAnswer(kind="none"), 78, False, ""),
        ("online", "", WandbAnswer(kind="key", problem="x does not take"), 78, False, ""),
        ("online", "", WandbAnswer(kind="server", problem="x cannot be"), 74, False, ""),
        ("online", "", WandbAnswer("x", "me"), None, False, "online at x, user me"),
        ("offline", "", None, None, False, "W&B: offline"),
        ("off", "", None, None, False, "W&B: off"),
    ],
)
@pytest.mark.sampled(2)
def test_a_wandb_problem_is_an_error_only_where_online_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    env: str,
    answer: WandbAnswer | None,
    code: int | None,
    warned: bool,
    said: str,
) -> None:
    def ask() -> WandbAnswer:
        assert answer
        return answer

    monkeypatch.setattr(wandb_check, "ask_wandb", ask)
    monkeypatch.setenv("WANDB_MODE", env)
    if code:
        with pytest.raises(GammaslimError, match="W&B: ") as error:
            wandb_check.check_wandb(mode)
        assert error.value.exit_code == code
    else:
        assert bool(wandb_check.check_wandb(mode)) == warned
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batch", "count", "processes", "expected"),
    [
        (32, 6000, 1, []),
        (32, 6016, 4, []),
        (32, 6000, 3, ["use a multiple of 3, e.g. 33"]),
        (2, 6000, 4, ["some 0 and some 1", "use a multiple of 4, e.g. 4"]),
        (32, 6001, 1, []),  # 17 in the last batch
        (32, 33, 1, ["only 1 of 32", "--batch-size 33 would be better"]),
        (64, 6 * 64 + 7, 1, ["only 7 of 64", "--batch-size 66 would be better"]),
        (64, 6 * 64 + 8, 1, []),
        (16, 113, 8, ["only 1 of 16", "--batch-size 24 would be better"]),
        (64, 5, 1, ["only 5 of 64"]),
    ],
)
def test_batches_that_do_not_divide_well(
    batch: int, count: int, processes: int, expected: list[str]
) -> None:
    said = "; ".join(batch_warnings(batch, count, processes))
    assert bool(said) == bool(expected), said
    for part in expected:
        assert part in said


def test_too_few_cores(flat_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, config = open_data(str(flat_data)), PruneConfig(workers=3)
    monkeypatch.setattr(resources, "available_cores", lambda: 8)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert core_warnings(config, dataset, cuda=False) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert core_warnings(config, dataset, cuda=False) == []
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    (warning,) = core_warnings(config, dataset, cuda=False)
    assert "7 cores here for 2 training processes with 3 loader processes each, 8 are" in warning
    assert core_warnings(config, dataset, cuda=True) == []
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    (warning,) = core_warnings(replace(config, workers=1), dataset, cuda=True)
    assert "1 core here for 1 training process with 1 loader process each, 2 are" in warning
    in_memory = open_data(None)
    assert core_warnings(config, in_memory, cuda=False) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "2 are recommended" in core_warnings(config, in_memory, cuda=False)[0]


@pytest.mark.parametrize(
    ("model", "args", "name"),
    [
        ("student", (), "student-photos"),
        ("student", (("width_mult", 0.5),), "student-width_mult=0.5-photos"),
        ("timm:create_model", (("model_name", "resnet18"),), "timm-resnet18-photos"),
        ("nets:make", (("name", "a/b c"), ("deep", True)), "nets-make-a-b-c-deep=true-photos"),
        ("nets.small:tiny", (), "nets.small-tiny-photos"),
        ("nets:build", (), "nets-build-photos"),
    ],
)
@pytest.mark.parametrize("data", ["photos", "photos/", "elsewhere/../photos"])
def test_the_default_folder_tells_networks_apart(
    model: str, args: tuple[tuple[str, str | float | bool], ...], name: str, data: str
) -> None:
    config = PruneConfig(model=model, model_arg=args, data=data)
    assert default_output(config) == Path("runs") / name
    assert default_output(PruneConfig()) == Path("runs/student-fashion-mnist")
