"""A run that is killed at any instant ends as one that never was."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.commands import HOMEWORK_CUT, TESTS, Result, gammaslim, run
from support.datasets import write_flat
from support.interrupted_runs import (
    KILL_AT,
    RECORD,
    TORCHRUN,
    assert_same_run,
    metrics,
    small_run,
)

# 48 images in batches of 16: 3 steps an epoch; base and two rounds of 2 epochs: 18 steps, and
# 1 + 2 + 2 * (1 + 2) evaluations; a position after every step and every epoch: 24
POINTS = [
    ("step", 1), ("step", 2), ("step", 5), ("step", 8), ("step", 12), ("step", 18),
    ("evaluation", 1), ("evaluation", 3), ("evaluation", 4), ("evaluation", 8),
    ("surgery", 1), ("surgery", 2), ("proof of a cut", 1),
    ("file write", 1), ("file write", 6), ("file write", 20),
    ("fsync", 2), ("fsync", 30), ("rename", 4), ("after a rename", 9), ("replace", 3),
    ("metrics line", 1), ("metrics line", 3), ("metrics line", 4),
    ("round to be saved", 2), ("round saved", 1), ("round saved", 2), ("summary", 2),
    ("old checkpoint", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = gammaslim(*small_run(noise, output))
    assert done.code == 0, done
    return output


@pytest.mark.parametrize(("place", "passage"), POINTS, ids=[f"{p} {n}" for p, n in POINTS])
@pytest.mark.sampled(3)
def test_a_killed_run_resumes_to_the_same_weights(
    noise: Path, undisturbed: Path, tmp_path: Path, place: str, passage: int
) -> None:
    output, proof = tmp_path / "run", tmp_path / "proof"
    killed = run(sys.executable, KILL_AT, place, passage, proof, *small_run(noise, output))
    assert killed.code == -signal.SIGKILL, killed
    assert proof.read_text() == place
    again = gammaslim(*small_run(noise, output))
    assert again.code == 0, again
    assert_same_run(output, undisturbed)


SPARSE = (
    "--base-epochs", 1, "--sparsity", "polarize", "--sparsity-weight", 20, "--sparsity-epochs", 2,
    "--rounds", 1, "--distill-alpha", 0.7,
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed_sparse(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sparse") / "run"
    done = gammaslim(*small_run(noise, output, *SPARSE))
    assert done.code == 0, done
    kinds = [line["event"] for line in metrics(output)]
    base = ["epoch", "gamma", "epoch", "epoch", "gamma", "round"]
    assert kinds == [*base, "slim", "epoch", "epoch", "round"]
    return output


@pytest.mark.parametrize(
    ("place", "passage"),
    [
        ("step", 5), ("step", 14), ("evaluation", 3), ("metrics line", 2), ("metrics line", 5),
    ],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_a_run_killed_in_sparse_epochs_or_a_distilled_round_resumes_to_the_same_weights(
    noise: Path, undisturbed_sparse: Path, tmp_path: Path, place: str, passage: int
) -> None:
    """Three steps an epoch: 4 to 9 are sparse, 10 to 15 learn from the base."""
    output, proof = tmp_path / "run", tmp_path / "proof"
    args = small_run(noise, output, *SPARSE)
    killed = run(sys.executable, KILL_AT, place, passage, proof, *args)
    assert killed.code == -signal.SIGKILL, killed
    assert gammaslim(*args).code == 0
    assert_same_run(output, undisturbed_sparse)


RECOVERED = ("--recover", 2, "--rounds", 1)


@pytest.fixture(scope="module")
def undisturbed_recovered(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recovered") / "run"
    done = gammaslim(*small_run(noise, output, *RECOVERED))
    assert done.code == 0, done
    assert "recovery: valid acc " in done.out
    summary = json.loads((output / "summary.json").read_text())
    (slim,) = [line for line in metrics(output) if line["event"] == "slim"]
    (entry,) = summary["rounds"]
    assert entry["valid_acc_recovered"] == slim["valid_acc_recovered"]
    assert entry["valid_acc_pruned"] == slim["valid_acc_pruned"]
    assert "valid_acc_recovered" not in summary["base"]
    return output


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("place", "passage"), [("recovery step", 1), ("recovery step", 2), ("step", 8)]
)
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_a_run_interrupted_in_or_after_recovery_resumes_to_the_same_weights(
    noise: Path, undisturbed_recovered: Path, tmp_path: Path, place: str, passage: int,
    signal_name: str,
) -> None:  # fmt: skip
    output, proof = tmp_path / "run", tmp_path / "proof"
    args = small_run(noise, output, *RECOVERED)
    stopped = run(
        sys.executable, KILL_AT, place, passage, proof, *args, env={"KILL_SIGNAL": signal_name}
    )
    assert stopped.code == (-signal.SIGKILL if signal_name == "SIGKILL" else 75), stopped
    assert proof.read_text() == place
    again = gammaslim(*args)
    assert again.code == 0, again
    assert_same_run(output, undisturbed_recovered)


@pytest.fixture(scope="module")
def undisturbed_pair(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pair") / "run"
    done = run(*TORCHRUN, 2, "-m", "job", *small_run(noise, output))
    assert done.code == 0, done
    return output


@pytest.mark.parametrize(
    ("place", "passage", "victim"),
    [
        ("step", 4, "0"), ("step", 8, "1"), ("step", 14, ""), ("evaluation", 2, "1"),
        ("surgery", 1, ""), ("file write", 5, "0"), ("metrics line", 3, "0"),
    ],
)  # fmt: skip
@pytest.mark.sampled(4)
def test_two_processes_of_which_one_or_both_are_killed_resume_to_the_same_weights(
    noise: Path, undisturbed_pair: Path, tmp_path: Path, place: str, passage: int, victim: str
) -> None:
    output, proof = tmp_path / "run", tmp_path / "proof"
    env = {"KILL_RANK": victim}
    command = (*TORCHRUN, 2, KILL_AT, place, passage, proof, *small_run(noise, output))
    killed = run(*command, env=env)
    assert killed.code != 0
    assert proof.read_text() == place
    again = run(*TORCHRUN, 2, "-m", "job", *small_run(noise, output))
    assert again.code == 0, again
    assert_same_run(output, undisturbed_pair)


def test_killed_again_and_again(noise: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for attempt in range(4):
        killed = run(
            sys.executable, KILL_AT, "step", 3, tmp_path / f"{attempt}", *small_run(noise, output)
        )
        assert killed.code == -signal.SIGKILL, killed
    assert gammaslim(*small_run(noise, output)).code == 0
    assert_same_run(output, undisturbed)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "STOP"])
@pytest.mark.sampled(2)
def test_a_request_stops_the_run_and_saves_its_position(
    noise: Path, undisturbed: Path, tmp_path: Path, how: str
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "job", *map(str, small_run(noise, output))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait_for(output / "checkpoints", process)
    began = time.monotonic()
    if how == "STOP":
        (output / "STOP").touch()
    else:
        process.send_signal(getattr(signal, how))
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 15
    status = json.loads((output / "status.json").read_text())
    if process.returncode == 0:  # so small a run may be over before the file is looked for
        assert how == "STOP"
    else:
        assert process.returncode == 75, errors
        assert (status["state"], status["exit_code"]) == ("stopped", 75)
    again = gammaslim(*small_run(noise, output))  # a STOP that was left does not stop it again
    assert again.code == 0, again
    assert_same_run(output, undisturbed)


STOPS = [
    ("step", 2, 1), ("evaluation", 1, 1), ("evaluation", 4, 1), ("surgery", 1, 1),
    ("proof of a cut", 1, 1), ("file write", 3, 1), ("metrics line", 3, 1), ("round saved", 1, 1),
    ("W&B begins", 1, 1), ("step", 5, 2), ("evaluation", 2, 2), ("surgery", 1, 2),
    ("proof of a cut", 1, 2), ("W&B begins", 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(("place", "passage", "processes"), STOPS)
@pytest.mark.sampled(4)
def test_a_request_is_honoured_wherever_it_comes(
    noise: Path, undisturbed: Path, tmp_path: Path, place: str, passage: int, processes: int
) -> None:
    """Of two processes one is asked, and both stop."""
    output, proof = tmp_path / "run", tmp_path / "proof"
    env = {"KILL_SIGNAL": "SIGTERM", "KILL_RANK": "0" if "proof" in place else "1"}
    start = (*TORCHRUN, processes) if processes > 1 else (sys.executable,)
    if processes == 1 or place == "W&B begins":
        env["KILL_RANK"] = "0"
    stopped = run(*start, KILL_AT, place, passage, proof, *small_run(noise, output), env=env)
    assert proof.read_text() == place
    assert (stopped.code, "exitcode  : 75" in stopped.err) in {(75, False), (1, True)}, stopped
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    again = gammaslim(*small_run(noise, output))
    assert again.code == 0, again
    if processes == 1:
        assert_same_run(output, undisturbed)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_request_is_honoured_while_images_are_checked(tmp_path: Path, processes: int) -> None:
    data = write_flat(
        tmp_path / "data", {"training": 60, "validation": 2}
    )  # minutes, a second each
    start = (*TORCHRUN, processes) if processes > 1 else (sys.executable,)
    args = ("prune", "--data", data, "--output", tmp_path / "run")
    began = time.monotonic()
    stopped = run(
        *start, KILL_AT, "data check", 3, tmp_path / "proof", *args,
        env={"KILL_SIGNAL": "SIGUSR1", "KILL_RANK": "0"},
    )  # fmt: skip
    assert (tmp_path / "proof").exists()
    assert (stopped.code, "exitcode  : 75" in stopped.err) in {(75, False), (1, True)}, stopped
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_plan_is_refused(noise: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(sys.executable, KILL_AT, "step", 9, tmp_path / "proof", *small_run(noise, output))
    other = tmp_path / "other"
    assert gammaslim(*small_run(noise, other, "--seed", 5)).code == 0
    card = json.loads((output / "rounds/00/model.json").read_text())
    shutil.copy(other / "rounds/00/model.safetensors", output / "rounds/00/model.safetensors")
    again = gammaslim(*small_run(noise, output))
    assert again.code == 65, (again, card["lineage"])
    assert "was cut from another model" in again.err


def damage(path: Path, kind: str) -> None:
    state = path / "state.safetensors"
    if kind == "truncated":
        state.write_bytes(state.read_bytes()[:-100])
    elif kind == "bit-flipped":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    else:
        (path / {"no manifest": "manifest.json", "no state": state.name}[kind]).unlink()


def killed_in_the_base(noise: Path, output: Path) -> Result:
    return run(sys.executable, KILL_AT, "step", 5, output.parent / "p", *small_run(noise, output))


@pytest.mark.parametrize("kind", ["truncated", "bit-flipped", "no manifest", "no state"])
@pytest.mark.sampled(2)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    noise: Path, undisturbed: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "run"
    killed_in_the_base(noise, output)
    _older, newest = sorted((output / "checkpoints").iterdir())
    damage(newest, kind)
    again = gammaslim(*small_run(noise, output))
    assert again.code == 0, again
    assert newest.name in again.out
    assert_same_run(output, undisturbed)


def test_without_a_whole_checkpoint_nothing_is_overwritten(noise: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    killed_in_the_base(noise, output)
    for path in (output / "checkpoints").iterdir():
        damage(path, "bit-flipped")
    before = {p: p.read_bytes() for p in (output / "checkpoints").rglob("*") if p.is_file()}
    again = gammaslim(*small_run(noise, output))
    assert again.code == 74, again
    assert "does not match its SHA-256" in again.err
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    noise: Path, undisturbed: Path, tmp_path: Path, first: int, then: int
) -> None:
    output = tmp_path / "run"
    options = "--optimizer", "sgd", "--lr", "0.001", "--model", "support.smooth:student"
    sgd = small_run(noise, output, *options, *HOMEWORK_CUT)
    one = small_run(noise, tmp_path / "one", *options, *HOMEWORK_CUT)
    reference = gammaslim(*one, cwd=TESTS)
    assert reference.code == 0
    kill = (KILL_AT, "step", 5, tmp_path / "proof")
    killed = run(*((*TORCHRUN, first) if first > 1 else (sys.executable,)), *kill, *sgd, cwd=TESTS)
    assert killed.code != 0
    again = run(
        *((*TORCHRUN, then) if then > 1 else (sys.executable,)), "-m", "job", *sgd, cwd=TESTS
    )
    assert again.code == 0, again
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    resume = next(line for line in lines if line["event"] == "resume")
    assert (resume["processes_before"], resume["processes"]) == (first, then)
    for ours, theirs in zip(metrics(output), metrics(tmp_path / "one"), strict=True):
        if ours["event"] == "epoch":
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)


def recorded(path: Path) -> dict[tuple[int, int], list[str]]:
    """Hashes of the images of each global batch, by round and step."""
    batches: dict[tuple[int, int], list[str]] = {}
    for line in path.read_text().splitlines():
        round_, step, hashes = json.loads(line)
        batches.setdefault((round_, step), []).extend(hashes)
    return {key: sorted(hashes) for key, hashes in batches.items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_global_batches_do_not_depend_on_processes_workers_and_interruptions(
    tmp_path: Path, first: int, then: int
) -> None:
    # 21 images in batches of 4: 6 steps an epoch, the last of one image
    data = write_flat(tmp_path / "data", {"training": 7, "validation": 2})
    args = (
        "prune", "--data", data, "--base-epochs", 2, "--rounds", 1, "--epochs", 1,
        "--batch-size", 4, "--wandb", "off", "--checkpoint-every", 0,
    )  # fmt: skip

    def train(name: str, count: int, last: int, workers: int, output: str) -> Result:
        start = (*TORCHRUN, count) if count > 1 else (sys.executable,)
        more = ("--workers", workers, "--output", tmp_path / output)
        return run(*start, RECORD, tmp_path / name, last, *args, *more)

    assert train("alone", 1, 0, 0, "undisturbed").code == 0
    assert train("before", first, 4, 2, "moved").code != 0
    again = train("after", then, 0, 1, "moved")
    assert again.code == 0, again
    alone, before, after = (recorded(tmp_path / name) for name in ("alone", "before", "after"))
    assert sorted(alone) == [(0, step) for step in range(12)] + [(1, step) for step in range(6)]
    assert sorted(map(len, alone.values())) == [1] * 3 + [4] * 15
    assert len({hash_ for hashes in alone.values() for hash_ in hashes}) > 50  # augmented anew
    assert before == {(0, step): alone[0, step] for step in range(4)}
    assert min(after) in {(0, 3), (0, 4)}  # at most what came after the last position
    assert after == {key: alone[key] for key in after}
    assert set(before) | set(after) == set(alone)
