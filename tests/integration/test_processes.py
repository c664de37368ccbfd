"""Several processes give what one gives, through the real launchers, on a CPU with gloo."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.commands import HOMEWORK_CUT, TESTS, gammaslim, run
from support.datasets import write_flat, write_noise_idx
from support.interrupted_runs import TORCHRUN

WORKERS = TESTS / "support" / "workers"
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


def options(data: Path, output: Path) -> tuple[object, ...]:
    # 90 images in batches of 16: the last has 10; 31 for validation: odd
    return (
        "prune", "--data", data, "--output", output, "--base-epochs", 2, "--rounds", 1,
        "--epochs", 1, "--batch-size", 16, "--optimizer", "sgd", "--lr", "0.001",
        "--wandb", "off", "--model", "support.smooth:student", *HOMEWORK_CUT,
    )  # fmt: skip


def summary(output: Path) -> dict[str, dict[str, float]]:
    return json.loads((output / "summary.json").read_text())


def epochs(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "epoch"]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise_idx(tmp_path_factory.mktemp("noise") / "idx", 90, 31)


@pytest.fixture(scope="module")
def alone(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    done = gammaslim(*options(noise, output), cwd=TESTS)
    assert done.code == 0, done
    return output


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "launcher",
    [
        (*ACCELERATE, "--num_processes", 2),
        (*ACCELERATE, "--multi_gpu", "--num_processes", 2),
        (*TORCHRUN, 3),
    ],
    ids=["accelerate", "accelerate --multi_gpu", "torchrun"],
)
def test_the_same_accuracies_and_weights_as_one_process(
    noise: Path, alone: Path, tmp_path: Path, launcher: tuple[object, ...]
) -> None:
    """StudentNet with BatchNorm in synchronised mode (the default), float32, SGD.

    Compared are all 72 tensors after two epochs of base training and after one round more (surgery
    and another epoch), to 1e-5, and the accuracies, exactly. Softplus and average pooling take the
    places of ReLU6 and max-pooling, where rounding decides on which side of a kink a value lies,
    and with it the gradient. AdamW would not do: its first step is the sign of a gradient, and that
    of a bias in front of a BatchNorm is rounding noise.
    """
    output = tmp_path / "run"
    done = run(*launcher, "-m", "job", *options(noise, output), cwd=TESTS)
    assert done.code == 0, done
    world = 3 if launcher[-1] == 3 else 2
    assert f"{world} processes" in done.out
    assert done.out.count("rate 0.9500") == 1  # one voice
    for round_ in ("00", "01"):
        several_weights = load_file(output / "rounds" / round_ / "model.safetensors")
        single_weights = load_file(alone / "rounds" / round_ / "model.safetensors")
        assert len(several_weights) == 72
        for key, value in several_weights.items():
            assert value.shape == single_weights[key].shape
            assert (value.double() - single_weights[key].double()).abs().max() < 1e-5, (round_, key)
    for mine, single in zip(epochs(output), epochs(alone), strict=True):
        assert mine["train_loss"] == pytest.approx(single["train_loss"], rel=1e-4)
        assert mine["valid_loss"] == pytest.approx(single["valid_loss"], rel=1e-3)
    one, several = summary(alone), summary(output)
    assert several["base"]["valid_acc"] == one["base"]["valid_acc"]
    assert several["rounds"][0]["valid_acc"] == one["rounds"][0]["valid_acc"]
    assert several["rounds"][0]["valid_acc_pruned"] == one["rounds"][0]["valid_acc_pruned"]


def test_parts_of_a_batch_are_the_same_over_processes(tmp_path: Path) -> None:
    """With --accumulate each part is shared by the ranks, and its BatchNorm statistics too."""
    data = write_noise_idx(tmp_path / "idx", 64, 8)
    more = ("--batch-size", 16, "--accumulate", 2, "--rounds", 0)
    for name, launcher in (("one", ()), ("two", ("launch", "--nproc", 2, "--"))):
        done = gammaslim(*launcher, *options(data, tmp_path / name), *more, cwd=TESTS)
        assert done.code == 0, done
    one, two = (
        load_file(tmp_path / name / "rounds" / "00" / "model.safetensors")
        for name in ("one", "two")
    )
    for key, value in one.items():
        assert (value.double() - two[key].double()).abs().max() < 1e-5, key


def test_accuracies_on_the_built_in_data_agree_within_noise(tmp_path: Path) -> None:
    accuracies = []
    for name, launcher in (("one", ()), ("two", (*ACCELERATE, "--num_processes", 2, "-m", "job"))):
        args = ("prune", "--output", tmp_path / name, "--base-epochs", 1, "--rounds", 0)
        args = (*args, "--wandb", "off")
        done = run(*launcher, *args) if launcher else gammaslim(*args)
        assert done.code == 0, done
        accuracies.append(summary(tmp_path / name)["base"]["valid_acc"])
    assert abs(accuracies[0] - accuracies[1]) < 0.08
    assert min(accuracies) > 0.6


@pytest.mark.sampled(2)
@pytest.mark.parametrize("world", [3, 2])
def test_normalisation_gradients_and_counts_over_ranks(world: int) -> None:
    done = run(*TORCHRUN, world, WORKERS / "ranks.py")
    assert done.code == 0, done
    assert done.out.count("all checks passed") == world


def test_an_error_of_the_main_process_ends_all_and_is_said_once(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 3, "validation": 2})
    (data / "training" / "1_9.png").write_text("no image")
    done = run(*TORCHRUN, 2, "-m", "job", "prune", "--data", data, "--output", tmp_path / "run")
    assert done.code != 0
    assert done.err.count("1_9.png cannot be read") == 1
    assert "exitcode  : 65" in done.err


def test_evaluate_and_predict_with_two_processes(
    finished_run: Path, flat_data: Path, tmp_path: Path
) -> None:
    args = ("evaluate", finished_run, "--data", flat_data, "--json")
    one, two = gammaslim(*args), run(*TORCHRUN, 2, "-m", "job", *args)
    assert one.code == two.code == 0, two
    single, double = json.loads(one.out), json.loads(two.out)
    assert single["confusion"] == double["confusion"]
    assert single["loss"] == pytest.approx(double["loss"], rel=1e-5)
    assert single["count"] == 15
    rows = []
    for name, launcher in (("a.csv", ()), ("b.csv", (*TORCHRUN, 2, "-m", "job"))):
        args = ("predict", finished_run, "--data", flat_data, "--output", tmp_path / name)
        done = run(*launcher, *args) if launcher else gammaslim(*args)
        assert done.code == 0, done
        rows.append((tmp_path / name).read_text())
    assert rows[0] == rows[1]


def test_others_wait_for_the_main_process_as_long_as_it_is_alive() -> None:
    """Silence for one second in place of five minutes; no launcher watches these pairs.

    The main process works for three seconds, is killed, or is stopped, as if its machine were gone.
    """
    done = run(
        sys.executable, WORKERS / "waiting.py", "works", "dies", "stops",
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.code == 0, done
    ends = {(e["event"], e["rank"]): e for e in map(json.loads, done.out.splitlines())}
    assert {key: end["ended"].split(" for ")[0] for key, end in ends.items()} == {
        ("works", 0): "done",
        ("works", 1): "done",
        ("dies", 1): "lost",
        ("stops", 1): "the main process gives no sign of life",
    }, done
    assert ends["works", 1]["s"] > 2
    assert ends["works", 1]["cpu"] < 0.5  # it sleeps
    assert ends["dies", 1]["s"] < 2
    assert ends["stops", 1]["s"] < 5  # it leaves without the other


def test_several_processes_learn_what_one_learns() -> None:
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    done = run(*command, 3, WORKERS / "recovery.py")
    assert done.code == 0, done
    assert done.out.count("all checks passed") == 3
