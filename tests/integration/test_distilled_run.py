"""Distillation through the whole job, on one process and on several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from job.artifacts.model_card import ModelCard, save_model
from job.data.preprocessing import Preprocessing
from job.models.factory import build_network
from support.commands import ROOT, gammaslim, run
from support.cuts import randomise
from support.datasets import write_flat, write_noise_idx
from support.interrupted_runs import TORCHRUN

WORKERS = ROOT / "tests" / "support" / "workers"


@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_and_gamma_are_those_of_one_process(processes: int) -> None:
    done = run(*TORCHRUN, processes, WORKERS / "loss_ranks.py")
    assert done.code == 0, done
    assert done.out.count("all checks passed") == processes


def card(classes: int = 3, names: tuple[str, ...] = (), size: int = 32) -> ModelCard:
    return ModelCard(
        "student", {}, classes, preprocessing=Preprocessing.of("small", size), class_names=names
    )


def test_the_base_teaches_the_rounds(tmp_path: Path) -> None:
    data = write_noise_idx(tmp_path / "idx", 48, 20)

    def losses(*options: object) -> list[float]:
        output = tmp_path / f"run{len(options)}"
        done = gammaslim(
            "prune", "--data", data, "--model-arg", "base=4", "--base-epochs", 1, "--rounds", 1,
            "--epochs", 1, "--batch-size", 16, "--wandb", "off", "--output", output, *options,
        )  # fmt: skip
        assert done.code == 0, done
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        return [line["train_loss"] for line in lines if line["event"] == "epoch"]

    plain, taught = losses(), losses("--distill-alpha", 0.9)
    assert taught[0] == plain[0]
    assert taught[1] != plain[1]
    by_another = losses("--distill-alpha", 0.9, "--teacher", tmp_path / "run0")
    assert by_another[0] != plain[0]  # a teacher of its own teaches the base too


def test_a_run_is_not_resumed_with_another_teacher(flat_data: Path, tmp_path: Path) -> None:
    names = ("0", "1", "2")
    for name, seed in (("first", 1), ("other", 2)):
        save_model(
            tmp_path / name, randomise(build_network("student", 3, {}), seed), card(3, names, 64)
        )

    def prune(*options: object) -> Any:
        return gammaslim(
            "prune", "--data", flat_data, "--base-epochs", 1, "--rounds", 0, "--wandb", "off",
            "--image-size", 64, "--output", tmp_path / "run", *options,
        )  # fmt: skip

    alpha = ("--distill-alpha", 0.5)
    first = prune(*alpha, "--teacher", tmp_path / "first")
    assert first.code == 0, first
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert prune(*alpha, "--teacher", tmp_path / "copy").code == 0  # the same one elsewhere
    for options in (alpha, (*alpha, "--teacher", tmp_path / "other")):
        again = prune(*options)
        assert again.code == 78, again
        assert "--teacher" in again.err
    assert prune(*alpha, "--teacher", tmp_path / "none").code == 66
    eleven = tmp_path / "eleven"
    save_model(eleven, build_network("student", 11, {}), card(11, (), 64))
    wrong = prune(*alpha, "--teacher", eleven)
    assert (wrong.code, wrong.err.count("\n")) == (65, 1), wrong


def test_a_teacher_of_bfloat16_autocast(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 4, "validation": 2})
    done = gammaslim(
        "prune", "--data", data, "--base-epochs", 1, "--rounds", 1, "--epochs", 1, "--wandb", "off",
        "--precision", "bf16", "--distill-alpha", 0.9, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done
