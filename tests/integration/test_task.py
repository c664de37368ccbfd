"""A task of the user's own goes through the whole job: rounds, kills, processes, report, export."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from job.artifacts.saving import load
from support.coco import map_by_image, write_coco
from support.commands import HOMEWORK_CUT, ROOT, Result, gammaslim, run
from support.interrupted_runs import KILL_AT, TORCHRUN, assert_same_run, metrics
from support.shapes import Segmentation, write_masks

TASK = "support.shapes:Segmentation"
HERE = {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}


def options(output: Path, *more: object) -> tuple[object, ...]:
    """Arguments of a run on 65 images, of which the last batch has one: 9 steps an epoch."""
    return (
        "prune", "--task", TASK, "--model", "support.shapes:UNet", "--output", output,
        "--base-epochs", 4, "--rounds", 2, "--epochs", 1, "--batch-size", 8, "--lr", "0.005",
        "--workers", 0, "--wandb", "off", "--checkpoint-every", 0, *more,
    )  # fmt: skip


GLOBAL = ("--policy", "global", "--target", "params=0.5", "--recover", 1)


def command(*args: object) -> Result:
    return gammaslim(*args, env=HERE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("task") / "run"
    done = command(*options(output, *GLOBAL))
    assert done.code == 0, done
    assert "data: task support.shapes:Segmentation: 65 training, 23 validation" in done.out
    assert "miou after cut" in done.out
    return output


def test_a_unet_ends_smaller_at_an_equal_metric(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    base, last = summary["base"], summary["rounds"][-1]
    assert last["params"] < 0.51 * base["params"]
    assert last["valid_miou"] >= base["valid_miou"] > 0.5
    assert summary["recommended"] == "rounds/02"
    assert "miou +" in summary["reason"]
    for record in (*metrics(undisturbed), base, last):
        assert record["metric"] == "miou"
        assert not any("acc" in str(key) for key in record), record
    assert 0 < base["metrics"]["pixel_acc"] < 1


def test_the_narrow_network_scores_what_the_summary_says(undisturbed: Path) -> None:
    """Against the mean IoU computed here, image by image."""
    network, task = load(undisturbed), Segmentation()
    shared, either = torch.zeros(3), torch.zeros(3)
    for image, mask in (task.validation[index] for index in range(23)):
        with torch.no_grad():
            classes = network(image[None]).argmax(1)[0]
        for label in range(3):
            predicted, true = (classes == label) & (mask >= 0), mask == label
            shared[label] += (predicted & true).sum()
            either[label] += (predicted | true).sum()
    summary = json.loads((undisturbed / "summary.json").read_text())
    expected = float((shared / either).mean())
    assert summary["rounds"][-1]["valid_miou"] == pytest.approx(expected, rel=1e-6)
    shown = command("evaluate", undisturbed, "--json", "--workers", 0)
    assert shown.code == 0, shown
    found = json.loads(shown.out)
    assert found["miou"] == pytest.approx(expected, rel=1e-6)
    assert (found["count"], found["split"]) == (23, "validation")


def kill_and_resume(tmp_path: Path, place: str, passage: int, *arguments: object) -> None:
    """Run a command that is killed when it passes ``place`` for that time, and run it again."""
    killed = run(sys.executable, KILL_AT, place, passage, tmp_path / "proof", *arguments, env=HERE)
    assert killed.code == -signal.SIGKILL, killed
    again = command(*arguments)
    assert again.code == 0, again


@pytest.mark.parametrize(
    ("place", "passage"), [("step", 40), ("recovery step", 3), ("surgery", 2), ("round saved", 2)]
)
@pytest.mark.sampled(4)
def test_a_killed_run_resumes_to_the_same_bytes(
    undisturbed: Path, tmp_path: Path, place: str, passage: int
) -> None:
    kill_and_resume(tmp_path, place, passage, *options(tmp_path / "run", *GLOBAL))
    assert_same_run(tmp_path / "run", undisturbed)


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """One of them has no sample of the last batch, and pixels without a label differ."""
    short = "--base-epochs", 1, "--rounds", 1, "--epochs", 1, "--optimizer", "sgd", *HOMEWORK_CUT
    alone, both = tmp_path / "one", tmp_path / "two"
    for output, launcher in ((alone, (sys.executable,)), (both, (*TORCHRUN, 2))):
        done = run(*launcher, "-m", "job", *options(output, *short), env=HERE)
        assert done.code == 0, done
        assert "find_unused_parameters" not in done.err, done
    for one, two in zip(metrics(alone), metrics(both), strict=True):
        for key, value in one.items():
            if isinstance(value, float):
                assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    name = "rounds/01/model.safetensors"
    weights = load_file(both / name)
    for key, value in load_file(alone / name).items():
        torch.testing.assert_close(weights[key], value, atol=2e-4, rtol=1e-3, msg=key)


def test_other_commands_take_the_run(undisturbed: Path, tmp_path: Path) -> None:
    report = command("report", undisturbed)
    assert report.code == 0, report
    page = (undisturbed / "report.html").read_text("utf-8")
    assert "miou after fine-tuning" in page
    assert "accuracy after" not in page
    status = command("status", undisturbed, "--json")
    assert json.loads(status.out)["runs"][0]["best_miou"] > 0.5
    exported = command("export", undisturbed, "--output", tmp_path / "net.pt2")
    assert exported.code == 0, exported
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "(B, 1, 32, 32)" in card
    assert "classif" not in card
    assert command("inspect", undisturbed).code == 0
    slim = command("slim", undisturbed, "--output", tmp_path / "slim", "--target", "params=0.4",
                   "--calibration-images", 16, "--workers", 0)  # fmt: skip
    assert slim.code == 0, slim
    assert "importance refit, compensation regress" in slim.out  # on the items of its task
    assert "miou on the validation split of the task support.shapes:Segmentation" in slim.out
    assert "--data" not in slim.out
    refused: Any = command("predict", undisturbed, "--data", tmp_path, "--output", "-")
    assert refused.code == 2
    assert "for support.shapes:Segmentation, load the model in Python" in refused.err


def test_a_slim_model_is_the_base_of_another_run_of_its_task(
    undisturbed: Path, tmp_path: Path
) -> None:
    done = gammaslim(
        "prune", "--weights", undisturbed, "--output", tmp_path / "run", "--rounds", 1,
        "--epochs", 1, "--workers", 0, "--wandb", "off", env=HERE,
    )  # fmt: skip
    assert done.code == 0, done
    before = json.loads((undisturbed / "summary.json").read_text())["rounds"][-1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["base"]["valid_miou"] == pytest.approx(before["valid_miou"], rel=1e-6)
    assert summary["rounds"][0]["params"] < before["params"]


def test_a_killed_run_on_folders_of_masks_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    data = write_masks(tmp_path / "data", {"train": 17, "val": 6})
    arguments = [
        "prune", "--task", "segmentation", "--data", data, "--model", "support.shapes:rgb_unet",
        "--base-epochs", 2, "--rounds", 1, "--epochs", 1, "--batch-size", 4, "--workers", 0,
        "--wandb", "off", "--checkpoint-every", 0, "--output",
    ]  # fmt: skip
    runs = tmp_path / "one", tmp_path / "two"
    assert command(*arguments, runs[0]).code == 0
    kill_and_resume(tmp_path, "step", 12, *arguments, runs[1])
    assert_same_run(runs[1], runs[0])


def test_an_anchor_free_detector_ends_smaller_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    arguments = [
        "prune", "--task", "support.boxes:Detection", "--model", "support.boxes:Detector",
        "--base-epochs", 4, "--rounds", 1, "--epochs", 2, "--batch-size", 8, "--lr", "0.005",
        "--workers", 0, "--wandb", "off", "--checkpoint-every", 0, "--policy", "global",
        "--target", "params=0.6", "--output",
    ]  # fmt: skip
    runs = tmp_path / "one", tmp_path / "two"
    done = command(*arguments, runs[0])
    assert done.code == 0, done
    summary = json.loads((runs[0] / "summary.json").read_text())
    base, last = summary["base"], summary["rounds"][0]
    assert last["params"] <= 0.6 * base["params"]
    assert base["valid_ap50"] > 0.8
    assert last["valid_ap50"] > base["valid_ap50"] - 0.02
    assert last["metrics"]["recall"] > 0.8
    kill_and_resume(tmp_path, "step", 70, *arguments, runs[1])
    assert_same_run(runs[1], runs[0])


DETECTION = (
    "prune", "--task", "detection", "--model", "support.coco:ssd", "--rounds", 1, "--epochs", 1,
    "--batch-size", 4, "--workers", 0, "--wandb", "off", "--checkpoint-every", 0,
)  # fmt: skip


def test_a_killed_run_on_boxes_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", {"train": 17, "val": 6})
    arguments = *DETECTION, "--base-epochs", 2, "--data", data, "--output"
    runs = tmp_path / "one", tmp_path / "two"
    assert command(*arguments, runs[0]).code == 0
    kill_and_resume(tmp_path, "step", 12, *arguments, runs[1])
    assert_same_run(runs[1], runs[0])


def test_two_processes_train_a_detector_as_one_does(tmp_path: Path) -> None:
    """The last batch has an image for each process."""
    data = write_coco(tmp_path / "data", {"train": 10, "val": 5})
    short = *DETECTION, "--base-epochs", 1, "--optimizer", "sgd", "--lr", "0.001", *HOMEWORK_CUT
    alone, both = tmp_path / "one", tmp_path / "two"
    for output, launcher in ((alone, (sys.executable,)), (both, (*TORCHRUN, 2))):
        done = run(*launcher, "-m", "job", *short, "--data", data, "--output", output, env=HERE)
        assert done.code == 0, done
    for one, two in zip(metrics(alone), metrics(both), strict=True):
        for key in {"train_loss", "valid_loss"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-3), key
    last = json.loads((both / "rounds/01/model.json").read_text())["metrics"]
    assert last["valid_map"] == pytest.approx(map_by_image(both / "rounds/01", data))
