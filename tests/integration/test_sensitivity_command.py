"""``sensitivity`` on a command line, and what a run keeps of the measurement of its cuts."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import job
from job.artifacts.model_card import load_model
from job.slimming.group_sensitivity import TABLE_FRACTIONS
from job.slimming.sensitivity.measure import FRACTIONS
from support.commands import Result, gammaslim, run
from support.datasets import draw_image
from support.interrupted_runs import KILL_AT, assert_same_run, small_run
from support.report_pages import page

GLOBAL = ("--policy", "global", "--target", "macs=0.6")
INTERRUPTED = """
import os, signal, sys
from job.slimming.sensitivity.replay import Replay
Replay.run_from = lambda *_: os.kill(os.getpid(), signal.SIGINT)
from job.__main__ import main
sys.exit(main())
"""
FACTORY = """
from torch import nn

def tiny(num_classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
    )
"""


@pytest.fixture(scope="module")
def cut_run(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds that were allocated by the loss of the outputs."""
    output = tmp_path_factory.mktemp("cut") / "run"
    done = gammaslim(*small_run(noise, output, *GLOBAL))
    assert done.code == 0, done
    return output


def measure(*args: object, **more: Any) -> Result:
    done = gammaslim("sensitivity", *args, "--workers", 0, **more)
    assert done.code == 0, done
    return done


def test_a_round_keeps_what_the_command_measures_on_the_network_before(
    cut_run: Path, noise: Path
) -> None:
    assert not (cut_run / "rounds" / "00" / "sensitivity.json").exists()
    for number in (1, 2):
        before, after = (cut_run / "rounds" / f"{n:02d}" for n in (number - 1, number))
        kept = json.loads((after / "sensitivity.json").read_text())
        done = measure(before, "--data", noise, "--json")
        assert done.err == ""
        measured = json.loads(done.out)
        assert (measured["model"], measured["target"]) == ("student", None)
        assert (measured["loss"], measured["images"]) == (kept["loss"], kept["images"])
        assert measured["fractions"] == list(TABLE_FRACTIONS)
        assert kept["fractions"] == list(FRACTIONS)
        network, _ = load_model(after)
        widths = {name: len(t) for name, t in network.state_dict().items() if t.dim() == 4}
        for row, own in zip(measured["groups"], kept["groups"], strict=True):
            assert own["points"] == [p for p in row["points"] if p["fraction"] in FRACTIONS]
            assert own["kept"] == widths[f"{own['group']}.weight"]
            assert row["kept"] is None
            shared = ("group", "channels", "macs", "params")
            assert [own[key] for key in shared] == [row[key] for key in shared]


def test_a_target_shows_what_slim_keeps(cut_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "groups.csv"
    done = measure(cut_run / "rounds" / "00", "--target", "macs=0.7", "--csv", file)
    lines = done.out.splitlines()  # the data are the run's
    assert lines[0] == "student at width 1.0000, 32 pixels"
    assert lines[1].startswith("loss of the outputs (KL divergence of the softmax, in nats) on 11")
    assert lines[-1] == f"the table is saved in {file}"
    header = next(line for line in lines if line.startswith("group"))
    assert "90 %" in header
    assert header.endswith("at macs=0.7")
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    done = gammaslim(
        "slim", cut_run / "rounds" / "00", "--output", tmp_path / "slim", "--target", "macs=0.7",
        "--data", json_data(cut_run), "--workers", 0,
    )  # fmt: skip
    assert done.code == 0, done
    state = job.load(tmp_path / "slim").state_dict()
    assert {row["group"]: int(row["kept"]) for row in rows} == {
        row["group"]: len(state[f"{row['group']}.weight"]) for row in rows
    }
    on_stdout = measure(cut_run / "rounds" / "00", "--target", "macs=0.7", "--csv", "-")
    assert on_stdout.out == file.read_text()


def test_a_width_is_kept_of_all_groups_alike_as_by_slim(cut_run: Path, tmp_path: Path) -> None:
    model = cut_run / "rounds" / "00"
    done = measure(model, "--target", "width=0.5", "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    done = gammaslim("slim", model, "--output", tmp_path / "slim", "--target", "width=0.5")
    assert done.code == 0, done
    state = job.load(tmp_path / "slim").state_dict()
    assert {row["group"]: int(row["kept"]) for row in rows} == {
        row["group"]: len(state[f"{row['group']}.weight"]) for row in rows
    }
    # those that the width of a StudentNet does not scale stay
    assert {int(row["kept"]) / int(row["channels"]) for row in rows} == {0.5, 1.0}


def json_data(run_folder: Path) -> str:
    """The data of a run, by its config.toml."""
    lines = (run_folder / "config.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("path = "))


def test_the_report_shows_the_measurement(cut_run: Path, tmp_path: Path) -> None:
    assert "Channel groups before the cut of round " in page(cut_run / "report.html").text
    old = tmp_path / "old"  # of a version that kept nothing
    shutil.copytree(cut_run, old)
    assert gammaslim("report", old).code == 0
    assert (old / "figures" / "sensitivity.png").exists()
    for number in (1, 2):
        (old / "rounds" / f"{number:02d}" / "sensitivity.json").unlink()
    shutil.rmtree(old / "figures")
    assert gammaslim("report", old).code == 0
    assert not (old / "figures" / "sensitivity.png").exists()
    assert gammaslim(*small_run(Path(json_data(old)), old, *GLOBAL)).code == 0


@pytest.mark.parametrize(
    ("place", "passage"),
    [
        ("output loss", 9), ("proof of a cut", 1), ("output loss", 40), ("step", 8), ("step", 14),
        ("round saved", 2),
    ],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_a_run_killed_around_its_cut_keeps_the_same_measurement(
    noise: Path, cut_run: Path, tmp_path: Path, place: str, passage: int
) -> None:
    output, proof = tmp_path / "run", tmp_path / "proof"
    args = small_run(noise, output, *GLOBAL)
    killed = run(sys.executable, KILL_AT, place, passage, proof, *args)
    assert killed.code == -signal.SIGKILL, killed
    assert gammaslim(*args).code == 0
    assert_same_run(output, cut_run)


def test_only_cuts_that_measure_the_outputs_keep_them(noise: Path, tmp_path: Path) -> None:
    local = small_run(noise, tmp_path / "run", *GLOBAL, "--allocate", "local", "--rounds", 1)
    assert gammaslim(*local).code == 0
    assert not list((tmp_path / "run").rglob("sensitivity.*"))


def test_weights_of_a_factory_and_images_without_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(5):
        draw_image(rng, number % 3, 40, 30).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "nets.py").write_text(FACTORY)
    names: dict[str, Any] = {}
    exec(FACTORY, names)
    torch.save(names["tiny"]().state_dict(), tmp_path / "w.pt")
    done = measure(
        "w.pt", "--model", "nets:tiny", "--num-classes", 4, "--data", "photos", "--image-size", 32,
        "--calibration-images", 4, "--json", cwd=tmp_path,
    )  # fmt: skip
    record = json.loads(done.out)
    assert [row["group"] for row in record["groups"]] == ["0", "3"]
    assert (record["images"], record["image_size"]) == (1, 32)  # one is held out
    assert record["blocked"] == [{"layer": "8", "channels": 4, "reason": "the network's output"}]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--json", "--csv", "-"), 2, "--json and --csv - both print on standard output"),
        (("--target", "macs=50%"), 2, "did you mean macs=0.5?"),
        (("--target", "macs=0.001"), 2, "--target macs=0.001 cannot be reached"),
        (("--csv", "."), 73, "is a folder"),
        (("--data", ""), 2, "--data is empty"),
        (("--data", "nowhere"), 66, "nowhere"),
    ],
)
def test_what_is_wrong_is_named_on_one_line(
    cut_run: Path, tmp_path: Path, args: tuple[str, ...], code: int, said: str
) -> None:
    done = gammaslim("sensitivity", cut_run, *args, "--workers", 0, cwd=tmp_path)
    assert (done.code, done.out) == (code, ""), done
    assert said in done.err
    assert done.err.count("\n") == 1 or code == 2
    assert gammaslim("sensitivity", tmp_path / "missing").code == 66


def test_an_interrupted_measurement_ends_with_75(cut_run: Path, tmp_path: Path) -> None:
    done = run(
        sys.executable, "-c", INTERRUPTED, "sensitivity", cut_run, "--workers", 0, "--csv",
        tmp_path / "a.csv",
    )  # fmt: skip
    assert done.code == 75, done
    assert done.err.splitlines()[-1] == "Error: stopped by request"
    assert not (tmp_path / "a.csv").exists()
