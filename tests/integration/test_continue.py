"""Other options, more rounds, a slim model as base, rounds without a number: what a next run is."""

from __future__ import annotations

import json
import threading
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import job
import job.artifacts.run_folder
import job.cli.main
import job.config
import job.pipeline.model
import job.pipeline.round
import job.pipeline.session
from job.artifacts.compatibility import _other_origin, check_unchanged, option_text
from job.artifacts.lock import Lock
from job.artifacts.model_card import find_model, load_model, read_card
from job.artifacts.run_directory import Run
from job.config import PruneConfig
from job.errors import (
    ConfigError,
    DataError,
    InputNotFound,
    OtherRunError,
    OutputError,
    StopRequest,
    UsageError,
)
from job.pipeline.prune import prune
from job.pipeline.round import BestScores
from job.slimming.analysis import analyse
from support.commands import gammaslim
from support.datasets import write_flat, write_noise_idx
from support.records import BASE, DATASET

OPTIONS: dict[str, Any] = {
    "model_arg": (("base", 4),), "base_epochs": 1, "rounds": 1, "epochs": 1, "batch_size": 8,
    "wandb": "off", "workers": 0, "device": "cpu", "rate": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise_idx(tmp_path_factory.mktemp("noise") / "idx", 24, 8)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.pipeline.session, "write_run_report", lambda _: None)


def config(data: Path | None = None, **options: Any) -> PruneConfig:
    return PruneConfig(**{**OPTIONS, "data": data and str(data), **options})


def summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


# --- how options are told


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("target", "macs=0.5", "--target macs=0.5"),
        ("target", None, "no --target"),
        ("lr", 1e-3, "--lr 0.001"),
        ("model_arg", ["base=4", "name=a b"], "--model-arg base=4 --model-arg 'name=a b'"),
        ("model_arg", [], "no --model-arg"),
        ("mean", [0.5, 0.4, 0.3], "--mean 0.5,0.4,0.3"),
        ("sparsity_epochs", 0, "--sparsity-epochs 0"),
        ("rounds", "auto", "--rounds auto"),
    ],
)
def test_options_are_told_as_they_are_typed(name: str, value: Any, text: str) -> None:
    assert option_text(name, value) == text


def test_what_differs_is_told_as_it_is_typed_and_what_to_type() -> None:
    stored = PruneConfig(target="macs=0.5", lr=0.01).to_dict()
    with pytest.raises(OtherRunError) as caught:
        check_unchanged(stored, PruneConfig(round_to=8), "runs/x", 2)
    assert str(caught.value) == (
        "runs/x was begun with --lr 0.01, with --target macs=0.5 and with --round-to 1, this "
        "command is with --lr 0.001, without --target and with --round-to 8: type --lr 0.01 "
        "--target macs=0.5 --round-to 1 to resume it, or choose another --output for a new run"
    )
    stored = PruneConfig().to_dict()
    with pytest.raises(OtherRunError, match=r"leave out --target to resume it"):
        check_unchanged(stored, PruneConfig(target="macs=0.5"), "runs/x", 2)


@pytest.mark.parametrize(
    ("target", "policy"), [(None, "uniform"), ("width=0.5", "uniform"), ("macs=0.5", "global")]
)
def test_the_policy_follows_from_the_target(target: str | None, policy: str) -> None:
    stored = PruneConfig(target=target).to_dict()
    assert stored["policy"] == policy
    check_unchanged(stored, PruneConfig(target=target), "runs/x", 2)
    other = "uniform" if policy == "global" else "global"
    begun = stored | {"policy": other}  # by an option, or by a version with another default
    with pytest.raises(OtherRunError, match=f"with --policy {other}, .* type --policy {other}"):
        check_unchanged(begun, PruneConfig(target=target), "runs/x", 2)
    check_unchanged(begun, PruneConfig(target=target, policy=other), "runs/x", 2)


def test_a_run_of_a_version_without_an_option_has_its_default() -> None:
    stored = PruneConfig().to_dict()
    del stored["schedule"], stored["model_arg"], stored["rounds"]
    check_unchanged(stored, PruneConfig(), "runs/x", 2)
    with pytest.raises(OtherRunError, match="begun with --schedule cosine"):
        check_unchanged(stored, PruneConfig(schedule="step"), "runs/x", 2)


def test_only_rounds_may_grow() -> None:
    stored = PruneConfig(rounds=5).to_dict()
    for rounds in (5, 8, "auto", 3):
        check_unchanged(stored, PruneConfig(rounds=rounds), "runs/x", 3)
    with pytest.raises(ConfigError, match=r"has 5 rounds already.*type --rounds 5 or more"):
        check_unchanged(stored, PruneConfig(rounds=4), "runs/x", 5)
    stored = PruneConfig(rounds=5, target="macs=0.5").to_dict()
    with pytest.raises(OtherRunError, match=r"spread over the rounds.*--weights runs/x"):
        check_unchanged(stored, PruneConfig(rounds=6, target="macs=0.5"), "runs/x", 5)


def test_open_rounds_need_an_end() -> None:
    with pytest.raises(UsageError, match=r"--target macs=0\.5 is spread over a fixed number"):
        PruneConfig(rounds="auto", target="macs=0.5")
    with pytest.raises(UsageError, match="never end"):
        PruneConfig(rounds="auto", rate=1.0)
    assert PruneConfig(rounds="auto").most_points_lost == 1
    assert PruneConfig(rounds="auto", max_drop=3).most_points_lost == 3
    assert PruneConfig().most_points_lost is None


def test_another_teacher_is_named_alone() -> None:
    base = {"weights_sha256": BASE.weights_sha256, "epochs": BASE.epochs, "teacher_sha256": "0"}
    tables = {"dataset": {"fingerprint": DATASET.fingerprint}, "base": base}
    error = _other_origin("runs/a", tables, PruneConfig(base_epochs=1), DATASET, BASE)
    assert error
    assert error.difference == "runs/a was begun with another --teacher"


# --- the default folder


def test_fewer_rounds_of_other_data_or_another_base_are_another_run(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prune(config(noise, rounds=1))
    capsys.readouterr()
    prune(config(noise, rounds=1))
    assert (
        "runs/student-base=4-idx on 1 process, cpu, fp32; the run is finished and only shown"
        in (capsys.readouterr().out)
    )
    other = write_noise_idx(tmp_path / "other" / "idx", 24, 16)
    prune(config(other, rounds=0))
    assert "student-base=4-idx was begun on other data" in capsys.readouterr().out
    assert summary(tmp_path / "runs" / "student-base=4-idx-2")["state"] == "finished"
    with pytest.raises(ConfigError, match="has 1 round already"):
        prune(config(noise, rounds=0, output="runs/student-base=4-idx"))


def test_a_run_whose_base_is_not_finished_is_no_model_yet(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(InputNotFound, match="is a run whose base is not finished"):
        find_model(tmp_path)


@pytest.mark.parametrize("arguments", [("prune", "--rounds"), ("launch", "--nproc")])
def test_a_number_or_auto_is_asked_for_by_name(arguments: tuple[str, ...]) -> None:
    done = gammaslim(*arguments, "many", *(["--", "prune"] if "launch" in arguments else []))
    assert done.code == 2
    assert "'many' is neither a whole number nor auto" in " ".join(done.err.split())


def test_other_options_get_the_next_number_and_the_same_command_its_own_run(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = tmp_path / "runs" / "student-base=4-idx"
    second = first.with_name(f"{first.name}-2")
    one, two = config(noise, rounds=0), config(noise, rounds=0, seed=3)
    prune(one)
    prune(two)
    said = capsys.readouterr().out
    assert (
        "run: runs/student-base=4-idx-2 on 1 process, cpu, fp32; runs/student-base=4-idx was begun "
        "with --seed 0, this command is with --seed 3\n"
    ) in said
    numbers = [(run / "metrics.jsonl").read_bytes() for run in (first, second)]
    prune(one)
    prune(two)
    assert [(run / "metrics.jsonl").read_bytes() for run in (first, second)] == numbers
    other = write_noise_idx(tmp_path / "other" / "idx", 24, 16)
    prune(config(other, rounds=0, seed=3))  # other data of the same name
    assert sorted(path.name for path in first.parent.iterdir()) == [
        first.name, second.name, f"{first.name}-3",
    ]  # fmt: skip
    capsys.readouterr()
    prune(config(noise, rounds=0, seed=3, dry_run=True))
    said = capsys.readouterr().out
    assert "output: runs/student-base=4-idx-2 can be written; its run is resumed" in said
    with pytest.raises(OtherRunError, match="begun with --seed 0"):
        prune(config(noise, rounds=0, seed=3, output=str(first)))
    with pytest.raises(OtherRunError, match="begun with --seed 0"):
        prune(config(noise, rounds=0, seed=9, resume="require"))
    with pytest.raises(OutputError, match="--resume never"):
        prune(config(noise, rounds=0, output=str(first), resume="never"))
    prune(config(noise, rounds=0, resume="never"))
    assert len(list(first.parent.iterdir())) == 4
    with pytest.raises(InputNotFound, match="there is no run in runs/student-width_mult=2"):
        prune(config(noise, model_arg=(("width_mult", 2),), resume="require"))


def test_a_file_in_place_of_the_folder_of_runs_cannot_be_written_to(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()
    with pytest.raises(OutputError, match="cannot write into runs: it is not a folder"):
        prune(config(noise, rounds=0))


def test_a_run_that_was_named_without_its_model_arguments_is_resumed(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prune(config(noise, rounds=0, output="runs/student-idx"))
    prune(config(noise, rounds=0))
    prune(config(noise, rounds=0, resume="require"))
    assert [path.name for path in Path("runs").iterdir()] == ["student-idx"]
    prune(config(noise, rounds=0, seed=1))
    prune(config(noise, rounds=0, resume="never"))
    assert len(list(Path("runs").iterdir())) == 3
    (tmp_path / "runs" / "student-idx" / "config.toml").write_text("?")
    prune(config(noise, rounds=0))  # it may be any run


def test_of_two_that_begin_at_the_same_time_the_second_gets_the_next_number(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has the folder's lock, and has not written yet what run it is."""
    monkeypatch.chdir(tmp_path)
    first = tmp_path / "runs" / "student-base=4-idx"
    lock = Lock(first)
    lock.acquire()

    def begin() -> None:
        time.sleep(0.5)
        Run(first)._create(config(noise, seed=8), DATASET, BASE)

    thread = threading.Thread(target=begin)
    thread.start()
    prune(config(noise, rounds=0))
    thread.join()
    assert (first.with_name(f"{first.name}-2") / "summary.json").exists()
    assert not (first / "summary.json").exists()
    second = Lock(first.with_name(f"{first.name}-2"))
    second.acquire()
    prune(config(noise, rounds=0))  # finished: it is only shown, and needs no lock
    Run(second.path.parent).restate_summary("finished", "running")
    with pytest.raises(OutputError, match="student-base=4-idx-2 is in use by process"):
        prune(config(noise, rounds=0))  # the same command: that run is at work
    second.release()
    lock.release()


def test_one_that_wrote_its_configuration_meanwhile_has_the_folder(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = tmp_path / "runs" / "student-base=4-idx"
    acquire = Lock.acquire

    def late(self: Lock, *args: Any) -> None:
        if self.path.parent.name == first.name:
            Run(first.resolve())._create(config(noise, seed=8), DATASET, BASE)
        acquire(self, *args)

    monkeypatch.setattr(Lock, "acquire", late)
    prune(config(noise, rounds=0))
    assert (first.with_name(f"{first.name}-2") / "summary.json").exists()
    assert sorted(path.name for path in first.iterdir()) == ["config.toml", "rounds"]


# --- more rounds


def test_more_rounds_of_a_finished_run_continue_from_it(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    prune(config(noise, rounds=2, output=str(whole)))
    prune(config(noise, rounds=1, output=str(run)))
    before = {p: p.read_bytes() for p in (run / "rounds").rglob("*.safetensors")}
    capsys.readouterr()
    prune(config(noise, rounds=2, output=str(run)))
    assert "resuming in round 2, epoch 0, step 6; the run had finished before" in (
        capsys.readouterr().out
    )
    assert {p: p.read_bytes() for p in before} == before
    for round_ in ("00", "01", "02"):
        name = Path("rounds") / round_ / "model.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes(), round_
    assert (summary(run)["state"], len(summary(run)["rounds"])) == ("finished", 2)
    assert tomllib.loads((run / "config.toml").read_text())["prune"]["rounds"] == 2
    numbers = (run / "metrics.jsonl").read_bytes()
    prune(config(noise, rounds=2, output=str(run)))  # is finished, and only shown
    assert (run / "metrics.jsonl").read_bytes() == numbers
    with pytest.raises(ConfigError, match="has 2 rounds already, --rounds 1 is fewer"):
        prune(config(noise, rounds=1, output=str(run)))


def test_more_rounds_that_were_stopped_in_their_first_are_resumed(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    prune(config(noise, output=str(run)))

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job.pipeline.round, "cut", broken)
        with pytest.raises(job.errors.StopRequest):
            prune(config(noise, rounds=2, output=str(run)))
    assert summary(run)["state"] == "stopped"
    prune(config(noise, rounds=2, output=str(run)))
    assert (summary(run)["state"], len(summary(run)["rounds"])) == ("finished", 2)


# --- open-ended rounds


def test_rounds_without_a_number_end_when_one_loses_too_much(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracies = iter([0.9, 0.9, 0.89, 0.86, 0.9])
    monkeypatch.setattr(BestScores, "of", lambda _: BestScores(next(accuracies), 1.0, 0, 0.5))
    run = tmp_path / "run"
    prune(config(noise, rounds="auto", output=str(run)))
    said = capsys.readouterr().out
    assert "round 3: accuracy -4.00 points compared with the base" in said
    assert "--rounds auto allows -1: no further rounds" in said
    assert [entry["round"] for entry in summary(run)["rounds"]] == [1, 2, 3]
    assert summary(run)["recommended"] == "rounds/02"
    prune(config(noise, rounds="auto", output=str(run)))
    assert len(summary(run)["rounds"]) == 3


@pytest.mark.parametrize(("policy", "rate"), [("uniform", 0.3), ("global", 0.5)])
def test_rounds_without_a_number_end_when_nothing_more_can_be_cut(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str, rate: float
) -> None:
    run = tmp_path / "run"
    options = {"rounds": "auto", "max_drop": 100, "policy": policy, "rate": rate}
    prune(config(noise, **options, output=str(run), dry_run=True))
    said = capsys.readouterr().out
    assert "until one is more than 100 points below the base, or nothing more can be cut" in said
    planned = said.count("\n", said.index("base   1.0000"), said.index("then nothing more")) - 1
    prune(config(noise, **options, output=str(run)))
    said = capsys.readouterr().out
    entries = summary(run)["rounds"]
    assert (
        f"nothing more can be cut at --rate {rate} after round {len(entries)}: no further rounds"
    ) in said
    assert len(entries) == planned
    assert len(entries) > 1
    params = [summary(run)["base"]["params"], *(entry["params"] for entry in entries)]
    assert params == sorted(set(params), reverse=True)  # every round cut something


def test_a_round_traces_its_network_once(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to "can more be cut?" and the cut that follows share the trace."""
    traced: list[Any] = []

    def counted(network: Any, example: Any) -> Any:
        traced.append(network)
        return analyse(network, example)

    monkeypatch.setattr(job.pipeline.model, "analyse", counted)
    options = {"rounds": "auto", "max_drop": 100, "rate": 0.5}
    prune(config(noise, **options, output=str(tmp_path / "run")))
    base, *others = Counter(map(id, traced)).values()
    assert base == 2  # untrained for the forecast, and trained
    assert len(others) > 2
    assert set(others) == {1}


# --- a slim model as base


@pytest.fixture(scope="module")
def slim_run(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("slim") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.pipeline.session, "write_run_report", lambda _: None)
        prune(config(noise, output=str(run), rounds=2))
    return run


def weights(path: Path, **options: Any) -> PruneConfig:
    values = {"data": None, "weights": str(path), "model_arg": (), "base_epochs": None}
    return config(**{**values, **options})


@pytest.mark.parametrize("policy", ["uniform", "global"])
def test_a_slim_model_is_the_base_of_a_new_run(
    slim_run: Path, noise: Path, tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = slim_run / "rounds" / "02"
    prune(weights(model, output=str(tmp_path / "run"), policy=policy, target="params=0.5"))
    said = capsys.readouterr().out
    assert f"data: {noise}, the data of {model}" in said
    base, one = (read_card(tmp_path / "run" / "rounds" / name) for name in ("00", "01"))
    theirs = read_card(model)
    assert (base.model, base.args, base.class_names) == ("student", {"base": 4}, theirs.class_names)
    assert base.preprocessing == theirs.preprocessing
    assert base.layers == theirs.layers
    assert base.lineage.from_.round == 2
    assert base.lineage.from_.run == str(slim_run)
    # fractions are of the slim base
    assert base.base
    assert base.base.cost
    assert base.base.cost.params == theirs.metrics["params"]
    assert 0.4 < one.metrics["params"] / theirs.metrics["params"] <= 0.5
    images = torch.rand(2, 3, 32, 32)
    ours, _ = load_model(tmp_path / "run" / "rounds" / "00")
    torch.testing.assert_close(ours(images), job.load(model)(images))
    assert job.load(tmp_path / "run" / "rounds" / "01")(images).shape == (2, 4)


def test_a_students_width_continues_where_it_was_cut_uniformly(
    slim_run: Path, tmp_path: Path
) -> None:
    prune(weights(slim_run / "rounds" / "01", output=str(tmp_path / "run")))
    widths = [read_card(tmp_path / "run" / "rounds" / name).width for name in ("00", "01")]
    assert widths == pytest.approx([0.8, 0.64])
    whole = read_card(slim_run / "rounds" / "02")
    assert (
        read_card(tmp_path / "run" / "rounds" / "01").metrics["params"] == (whole.metrics["params"])
    )


def test_a_network_that_was_cut_unevenly_is_cut_on_by_fractions_of_what_is_left(
    slim_run: Path, noise: Path, tmp_path: Path
) -> None:
    uneven = tmp_path / "uneven"
    prune(config(noise, output=str(uneven), policy="global", target="channels=0.6"))
    prune(weights(uneven / "rounds" / "01", output=str(tmp_path / "run"), rounds=2))
    cards = [read_card(tmp_path / "run" / "rounds" / name) for name in ("00", "01", "02")]
    assert [card.width for card in cards] == pytest.approx([1, 0.8, 0.64])
    channels = [card.metrics["channels"] for card in cards]
    assert channels[0] > channels[1] > channels[2]


def test_a_run_stands_for_its_recommended_model(
    slim_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(weights(slim_run, output=str(tmp_path / "run"), rounds=0))
    recommended = summary(slim_run)["recommended"]
    assert (
        read_card(tmp_path / "run/rounds/00").metrics["params"]
        == (read_card(slim_run / recommended).metrics["params"])
    )
    capsys.readouterr()
    prune(weights(slim_run, rounds=1, dry_run=True, output=str(tmp_path / "dry")))
    assert "dry run: all is well" in capsys.readouterr().out


def test_a_folder_is_numbered_for_other_weights_and_not_for_options_that_they_bring(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = "runs/student-base=4-idx"
    prune(config(noise, rounds=0, image_size=32))
    capsys.readouterr()
    prune(weights(Path(first), rounds=0, rate=0.7))
    assert (
        f"run: {first}-2 on 1 process, cpu, fp32; {first} was begun without --weights, this "
        f"command is with --weights {first}\n"
    ) in capsys.readouterr().out
    with pytest.raises(
        OtherRunError,
        match=f"this command is without --weights: type --weights {first} to resume it, or",
    ):
        prune(config(noise, rounds=0, output=f"{first}-2"))
    with pytest.raises(OtherRunError, match=r"begun with --rate 0\.7, this command"):
        prune(weights(Path(first), rounds=0, rate=0.8, output=f"{first}-2"))


def test_what_contradicts_a_slim_base_is_named(slim_run: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    with pytest.raises(
        UsageError, match="has its own network, student with 4 classes: leave out --model"
    ):
        prune(weights(slim_run, model="resnet18", output=output))
    with pytest.raises(UsageError, match="4 classes: leave out --num-classes"):
        prune(weights(slim_run, num_classes=9, output=output))
    with pytest.raises(InputNotFound, match="is not a model"):
        prune(weights(tmp_path, output=output))
    cats = write_flat(tmp_path / "cats", {"training": 4, "validation": 2}, classes=5)
    with pytest.raises(DataError, match="has 4 classes, the data have 5"):
        prune(weights(slim_run, data=cats, output=output))
    assert not Path(output).exists()


def test_the_command_line_takes_all_of_it(slim_run: Path, tmp_path: Path) -> None:
    done = gammaslim(
        "prune", "--weights", slim_run, "--rounds", "auto", "--max-drop", 2, "--dry-run",
        "--wandb", "off", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done
    assert "more than 2 points" in done.out


def test_the_number_of_rounds_may_be_auto_in_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[prune]\nrounds = "auto"\n')
    args = ["--config", str(tmp_path / "own.toml")]
    with job.cli.main.prune_command.make_context("prune", args) as ctx:
        assert ctx.params["rounds"] == "auto"
    with job.cli.main.prune_command.make_context("prune", ["--rounds", "7"]) as ctx:
        assert ctx.params["rounds"] == 7
    for wrong in ("all", "-1", "2.5"):
        with pytest.raises(click.BadParameter):
            job.cli.main.prune_command.make_context("prune", ["--rounds", wrong])


def test_a_student_wider_than_width_1_is_cut_by_its_width(noise: Path, tmp_path: Path) -> None:
    prune(config(noise, model_arg=(("base", 2), ("width_mult", 2)), output=str(tmp_path / "run")))
    widths = [read_card(tmp_path / "run" / "rounds" / name).width for name in ("00", "01")]
    assert widths == pytest.approx([2, 1.6])


def test_a_run_keeps_the_default_base_epochs_that_it_was_begun_with(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job.config, "DEFAULT_BASE_EPOCHS", 2)
    monkeypatch.setattr(Run, "save_round", _stop)
    options = config(noise, base_epochs=None, rounds=0)
    with pytest.raises(StopRequest):
        prune(options)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job.config, "DEFAULT_BASE_EPOCHS", 3)  # in a later version
    prune(config(noise, base_epochs=None, rounds=0, dry_run=True))
    assert "plan: 2 epochs of base training" in capsys.readouterr().out
    prune(options)
    (run,) = Path("runs").iterdir()
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in epochs if e["event"] == "epoch"] == [0, 1]
    assert summary(run)["state"] == "finished"
    # the position after the last epoch was all that there was to resume from
    assert json.loads((run / "status.json").read_text())["epoch"] == 1


def _stop(*_: Any) -> None:
    raise StopRequest("stopped by request")
