"""The main job as a whole: its run directory, its resume, what it prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import job
from job.artifacts.model_card import load_model
from job.errors import DataError
from support.commands import HOMEWORK_CUT, ROOT, Result, gammaslim, run
from support.datasets import draw_image, write_flat, write_noise_idx

EPOCH_LINE = re.compile(
    r"rate \d\.\d{4} epoch +\d+: train loss: +\d+\.\d{4}, acc \d\.\d{4} "
    r"valid loss: +\d+\.\d{4}, acc \d\.\d{4}"
)


def events(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_run_directory_is_as_documented(finished_run: Path) -> None:
    config = tomllib.loads((finished_run / "config.toml").read_text())
    assert config["prune"]["batch_size"] == 10
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(config["dataset"]["fingerprint"]) == 64
    status = json.loads((finished_run / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["round"]) == ("finished", 0, 2)
    assert set(status) == {"state", "exit_code", "round", "epoch", "step", "time"}
    kinds = [event["event"] for event in events(finished_run)]
    a_round = ["slim", "epoch", "epoch", "round"]
    assert kinds == ["epoch", "epoch", "round", *a_round, *a_round]
    epoch = events(finished_run)[0]
    assert {
        "event", "round", "epoch", "step", "width", "train_loss", "train_acc", "valid_loss",
        "valid_acc", "lr", "images_per_second", "seconds", "params", "macs",
    } <= set(epoch)  # fmt: skip
    summary = json.loads((finished_run / "summary.json").read_text())
    assert list(summary) == [
        "format", "state", "base", "rounds", "recommended", "reason", "cautions", "seconds",
    ]  # fmt: skip
    assert summary["format"] == 1
    assert [r["params"] for r in summary["rounds"]] == [234_010, 215_794]
    for entry in summary["rounds"]:
        assert {
            "round", "width", "params", "macs", "bytes", "channels", "valid_acc_pruned",
            "valid_acc", "valid_loss", "best_epoch", "seconds", "latency",
            "speedup", "speedup_low", "speedup_high",
        } <= set(entry)  # fmt: skip
        assert entry["latency"] > 0
        assert 0 < entry["speedup_low"] <= entry["speedup"] <= entry["speedup_high"]
    assert "speedup" not in summary["base"]
    assert summary["base"]["latency"] > 0
    assert not list(finished_run.rglob("*.tmp"))


def test_models_load_from_two_files_alone(finished_run: Path, tmp_path: Path) -> None:
    assert [p.name for p in sorted((finished_run / "rounds").iterdir())] == ["00", "01", "02"]
    (tmp_path / "model").mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(finished_run / "rounds" / "02" / name, tmp_path / "model")
    network = job.load(tmp_path / "model")
    assert not network.training
    assert sum(p.numel() for p in network.parameters()) == 215_794
    assert network(torch.rand(1, 3, 40, 40)).shape == (1, 3)
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    assert card["format"] == 1
    assert card["width"] == 0.95 * 0.95
    assert card["class_names"] == ["0", "1", "2"]
    assert card["input"]["preset"] == "small"
    assert card["lineage"]["round"] == 2
    assert len(card["lineage"]["base_sha256"]) == 64
    recommended = job.load(finished_run)
    assert recommended(torch.rand(1, 3, 40, 40)).shape == (1, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[: len(c) // 2], "not a model card"),
        (lambda c: c.replace('"format": 1', '"format": 9'), "format 9"),
        (lambda c: c.replace('"student"', '"teacher"'), "teacher"),
        (lambda c: re.sub(r'("out": \[[^]]*)', r"\1, 4000", c, count=1), "describes no network"),
        (lambda c: c.replace('"out": [', '"out": ["a", ', 1), "lists of rising indices"),
        (lambda c: c.replace('"out": [', '"out": [4000, ', 1), "lists of rising indices"),
        (lambda c: c.replace('"num_classes": 3', '"num_classes": 4'), "3 class names for 4"),
        (lambda c: c.replace('"width"', '"breadth"'), "no 'width'"),
        (lambda c: c.replace("cnn.4.1", "cnn.99.1"), "describes no network"),
        (lambda c: "[]", "not a model card"),
    ],
)
@pytest.mark.sampled(3)
def test_a_damaged_model_card_is_named(
    finished_run: Path, tmp_path: Path, damage: object, message: str
) -> None:
    shutil.copytree(finished_run / "rounds" / "02", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        load_model(tmp_path / "model")


def test_epoch_lines_and_the_table_of_rounds(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 3, "validation": 2})
    done = gammaslim(
        "prune", "--data", data, "--base-epochs", 1, "--rounds", 1, "--epochs", 2, cwd=tmp_path
    )
    assert done.code == 0, done
    assert len(EPOCH_LINE.findall(done.out)) == 3
    assert "Food-11 files" in done.out
    heading = next(line for line in done.out.splitlines() if line.startswith("round"))
    assert re.split(r"  +", heading) == [
        "round", "width", "channels", "params", "MACs", "bytes", "latency", "speed-up",
        "acc after cut", "acc tuned",
    ]  # fmt: skip
    assert "recommended: rounds/" in done.out
    assert "\r" not in done.out + done.err  # no progress bar in a log


def test_the_same_command_again_trains_nothing(finished_run: Path, flat_data: Path) -> None:
    before = (finished_run / "metrics.jsonl").read_bytes()
    summary = (finished_run / "summary.json").read_bytes()
    args = (
        "prune", "--data", flat_data, "--output", finished_run, "--base-epochs", 2, "--rounds", 2,
        "--epochs", 2, "--batch-size", 10, "--workers", 0,
    )  # fmt: skip
    done = gammaslim(*args)
    assert done.code == 0, done
    assert "recommended" in done.out
    assert not EPOCH_LINE.search(done.out)
    assert (finished_run / "metrics.jsonl").read_bytes() == before
    assert (finished_run / "summary.json").read_bytes() == summary
    changed = gammaslim(*args, "--lr", "0.01")
    assert changed.code == 78
    assert "--lr 0.001" in changed.err
    assert gammaslim(*args, "--resume", "never").code == 73


def test_another_data_set_in_the_same_run_is_refused(finished_run: Path, tmp_path: Path) -> None:
    other = write_flat(tmp_path / "other", {"training": 8, "validation": 4})
    done = gammaslim(
        "prune", "--data", other, "--output", finished_run, "--base-epochs", 2, "--rounds", 2,
        "--epochs", 2, "--batch-size", 10,
    )  # fmt: skip
    assert done.code == 78, done
    assert "other data" in done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_weights(
    finished_run: Path, flat_data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "run"
    args = (
        "prune", "--data", str(flat_data), "--output", str(output), "--base-epochs", "2",
        "--rounds", "2", "--epochs", "2", "--batch-size", "10", "--workers", "1", "--wandb", "off",
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "job", *args], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (output / "rounds" / "00" / "model.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert b"run the same command to resume" in errors
    assert json.loads((output / "status.json").read_text())["state"] == "stopped"
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epo')  # what a power failure leaves
    again = gammaslim(*args)
    assert again.code == 0, again
    for round_ in ("00", "01", "02"):
        name = Path("rounds") / round_ / "model.safetensors"
        assert (output / name).read_bytes() == (finished_run / name).read_bytes(), round_
    assert "resume" in [event["event"] for event in events(output)]


def test_weights_start_without_base_training(finished_run: Path, flat_data: Path) -> None:
    weights = finished_run / "rounds" / "00" / "model.safetensors"
    output = finished_run.parent / "from weights"
    done = gammaslim(
        "prune", "--data", flat_data, "--weights", weights, "--output", output, "--rounds", 1,
        "--epochs", 1, "--wandb", "off",
    )  # fmt: skip
    assert done.code == 0, done
    ours = json.loads((output / "summary.json").read_text())["base"]
    theirs = json.loads((finished_run / "summary.json").read_text())["base"]
    assert ours["valid_acc"] == theirs["valid_acc"]
    assert "best_epoch" not in ours
    base = (output / "rounds" / "00" / "model.safetensors").read_bytes()
    assert base == weights.read_bytes()


def test_evaluate_finds_the_images_that_the_run_held_out(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 20})
    done = gammaslim(
        "prune", "--data", data, "--base-epochs", 6, "--rounds", 0, "--seed", 5, "--wandb", "off",
        "--batch-size", 6, "--output", tmp_path / "run",
    )  # fmt: skip
    assert "a stratified tenth of training (6) is held out" in done.out, done
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    record = json.loads(gammaslim("evaluate", tmp_path / "run", "--data", data, "--json").out)
    assert record["count"] == 6
    assert record["loss"] == pytest.approx(summary["base"]["valid_loss"], rel=1e-5)
    other = gammaslim("evaluate", tmp_path / "run", "--data", data, "--json", "--seed", 6)
    assert json.loads(other.out)["loss"] != pytest.approx(record["loss"], rel=1e-5)


def test_other_weights_do_not_pass_for_the_runs_own(
    finished_run: Path, flat_data: Path, tmp_path: Path
) -> None:
    def prune(*weights: object) -> Result:
        return gammaslim(
            "prune", "--data", flat_data, "--output", tmp_path / "run", "--rounds", 0,
            "--wandb", "off", *weights,
        )  # fmt: skip

    first, other = (finished_run / "rounds" / r / "model.safetensors" for r in ("00", "01"))
    assert prune("--weights", first).code == 0
    again = prune("--weights", other, "--model-arg", "width_mult=0.95")
    assert again.code == 78, again
    copied = tmp_path / "copy.safetensors"
    shutil.copy(first, copied)
    assert prune("--weights", copied).code == 0  # the same content in another place
    state = load_file(first)
    state["fc.0.bias"] += 1
    save_file(state, copied)
    for changed in (prune("--weights", copied), prune()):
        assert changed.code == 78, changed
        assert "was begun with --weights" in changed.err


@pytest.mark.parametrize("workers", [0, 2])
def test_bfloat16_on_a_cpu(tmp_path: Path, workers: int) -> None:
    data = write_flat(tmp_path / "data", {"training": 4, "validation": 2})
    done = gammaslim(
        "prune", "--data", data, "--base-epochs", 1, "--rounds", 1, "--epochs", 1, "--wandb", "off",
        "--precision", "bf16", "--workers", workers, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done
    assert "bf16" in done.out


def test_a_bug_ends_the_process_in_spite_of_loader_workers(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 8, "validation": 2})
    script = (
        "import job.training.trainer as f\n"
        "def bug(*_): raise RuntimeError('a bug')\n"
        "f.TrainingRound.step = bug\n"
        "from job.__main__ import main\nmain()\n"
    )
    began = time.monotonic()
    done = run(
        sys.executable, "-c", script, "prune", "--data", data, "--wandb", "off", "--workers", 2,
        "--cache", "off", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 1, done
    assert "a bug" in done.err
    assert time.monotonic() - began < 40


def test_skipped_images_do_not_change_what_was_held_out(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 20})
    (data / "training" / "0_0.png").write_text("no image")
    done = gammaslim(
        "prune", "--data", data, "--base-epochs", 6, "--rounds", 0, "--batch-size", 6,
        "--on-bad-image", "skip", "--wandb", "off", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done
    base = json.loads((tmp_path / "run" / "summary.json").read_text())["base"]
    args = ("evaluate", tmp_path / "run", "--data", data, "--json", "--on-bad-image")
    record = json.loads(gammaslim(*args, "skip").out)
    assert record["skipped"] == ["training/0_0.png"]
    assert record["loss"] == pytest.approx(base["valid_loss"], rel=1e-5)
    assert gammaslim(*args, "fail").code == 65
    training = gammaslim(*args, "skip", "--split", "training")
    assert json.loads(training.out)["count"] == 59 - record["count"]  # none counts in both


def test_a_weights_file_is_evaluated_as_prune_would(finished_run: Path, tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 2, "validation": 4})
    draw_image(np.random.default_rng(0), 1, 300, 300).save(data / "validation" / "1_9.png")
    weights = finished_run / "rounds" / "00" / "model.safetensors"
    done = gammaslim(
        "prune", "--data", data, "--weights", weights, "--rounds", 0, "--wandb", "off",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done
    base = json.loads((tmp_path / "run" / "summary.json").read_text())["base"]
    args = ("evaluate", weights, "--model", "student", "--data", data, "--json")
    for flag in ("fail", "skip"):
        record = json.loads(gammaslim(*args, "--on-bad-image", flag).out)
        assert record["loss"] == pytest.approx(base["valid_loss"], rel=1e-5)


def test_a_round_that_falls_too_far_is_the_last(tmp_path: Path) -> None:
    data = write_noise_idx(tmp_path / "idx", 96, 40)
    common = ("prune", "--data", data, "--model-arg", "base=4", "--batch-size", 8, "--wandb", "off")
    trained = gammaslim(
        *common, "--base-epochs", 8, "--rounds", 0, "--lr", 0.01, "--output", tmp_path / "base"
    )
    assert trained.code == 0, trained
    args = (
        *common, "--weights", tmp_path / "base/rounds/00/model.safetensors", "--rounds", 3,
        "--rate", 0.4, "--epochs", 1, "--lr", 1e-30, *HOMEWORK_CUT,  # the default loses too little
    )  # fmt: skip
    output = tmp_path / "run"
    done = gammaslim(*args, "--max-drop", 5, "--output", output)
    assert done.code == 0, done
    assert re.search(r"round 1: accuracy -\d+\.\d\d points .*, --max-drop allows -5", done.out)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["state"], summary["recommended"]) == ("finished", "rounds/00")
    assert "--max-drop" in summary["reason"]
    assert [entry["round"] for entry in summary["rounds"]] == [1]  # recorded all the same
    assert json.loads((output / "status.json").read_text())["state"] == "finished"
    before = (output / "metrics.jsonl").read_bytes()
    again = gammaslim(*args, "--max-drop", 5, "--output", output)
    assert again.code == 0, again
    assert (output / "metrics.jsonl").read_bytes() == before
    assert not EPOCH_LINE.search(again.out)
    (output / "summary.json").unlink()  # as if it had been killed right before its end
    resumed = gammaslim(*args, "--max-drop", 5, "--output", output)
    assert resumed.code == 0, resumed
    assert not EPOCH_LINE.search(resumed.out)
    assert json.loads((output / "summary.json").read_text())["rounds"] == summary["rounds"]


def test_the_wheel_holds_all_that_the_job_needs(tmp_path: Path) -> None:
    built = run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT
    )
    assert built.code == 0, built
    wheel = next(tmp_path.glob("gammaslim-*.whl"))
    target = tmp_path / "installed"
    run(sys.executable, "-m", "zipfile", "-e", wheel, target)
    packed = sum(f.stat().st_size for f in (target / "job" / "data" / "fashion_mnist").iterdir())
    assert packed <= 4_000_000
    assert "Zalando" in (target / "job" / "data" / "fashion_mnist" / "LICENSE").read_text()
    done = run(
        sys.executable, "-P", "-m", "job", "prune", "--dry-run",
        env={"PYTHONPATH": str(target)}, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done
    place = run(
        sys.executable, "-P", "-c", "import job; print(job.__file__)",
        env={"PYTHONPATH": str(target)}, cwd=tmp_path,
    )  # fmt: skip
    assert place.out.startswith(str(target)), place
    assert "6,000 training, 1,500 validation, 1,000 testing, 10 classes" in done.out


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("options", "least"),
    [(("--rounds", 1, "--base-epochs", 8, "--epochs", 2), 0.8), (("--rounds", 5), 0.85)],
)
def test_the_default_run_is_fast_and_stays_near_its_base(
    tmp_path: Path, options: tuple[object, ...], least: float
) -> None:
    before = os.times()
    done = gammaslim("prune", *options, cwd=tmp_path, fork=False)
    after = os.times()
    assert done.code == 0, done
    run = tmp_path / "runs" / "student-fashion-mnist"
    rows = events(run)
    epochs = sum(row["event"] == "epoch" for row in rows)
    # of processor time: fifty epochs within four minutes of two cores
    assert sum(after[2:4]) - sum(before[2:4]) < 60 + 8.5 * epochs
    config = tomllib.loads((run / "config.toml").read_text())["prune"]
    assert (config["importance"], config["compensate"]) == ("refit", "regress")
    summary = json.loads((run / "summary.json").read_text())
    base = summary["base"]["valid_acc"]
    assert base > least
    assert len(summary["rounds"]) == options[1]
    for entry in summary["rounds"]:
        assert entry["valid_acc_pruned"] > base - 0.03, summary
        assert base - 0.015 < entry["valid_acc"] < base + 0.02, summary  # slimming is measured
    assert summary["cautions"] == []
    widths = [round(entry["width"], 4) for entry in summary["rounds"]]
    assert widths == [0.95, 0.9025, 0.8574, 0.8145, 0.7738][: len(widths)]
