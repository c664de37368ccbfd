"""Commands as people type them: exit codes, one-line errors, files that appear."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import job
from job.cli.main import gammaslim as group
from job.config import PruneConfig
from support.commands import clean_environ, gammaslim, run
from support.datasets import draw_image, write_flat
from support.reference import PlainStudentNet


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert text.startswith("Error: ")
    return text


def test_options_and_the_configuration_are_the_same() -> None:
    context = group.commands["prune"].make_context("prune", [])
    assert context.params.pop("debug") is False
    assert PruneConfig(**context.params) == PruneConfig()
    assert set(context.params) == {field.name for field in fields(PruneConfig)}


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (["prune", "my data"], "; did you mean --data 'my data'?"),
        (["evaluate", "run", "data"], "; did you mean --data data?"),
        (["prune", "--data", "x", "y"], ""),
        (["inspect", "run", "x"], ""),
    ],
)
def test_a_word_too_many_is_refused_with_what_to_type(args: list[str], advice: str) -> None:
    done = CliRunner().invoke(group, args)
    assert done.exit_code == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: Got unexpected extra argument (")
    assert last.endswith(f"){advice}")


def into_closed_pipe(*args: object) -> tuple[int, str]:
    """Exit code and stderr of a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "job", *map(str, args)]
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, env=clean_environ(), check=False
        )
    return done.returncode, done.stderr.decode()


def test_a_closed_stdout_ends_a_command_quietly(finished_run: Path) -> None:
    """As after ``| head``: 74, which is the code of a failed write, and nothing on stderr."""
    for args in (["inspect", finished_run], ["evaluate", finished_run, "--json"], ["--help"]):
        assert into_closed_pipe(*args) == (74, ""), args


def test_a_run_whose_reader_has_gone_is_resumed(flat_data: Path, tmp_path: Path) -> None:
    args = ("prune", "--data", flat_data, "--output", tmp_path / "run", "--base-epochs", 3,
            "--rounds", 1, "--epochs", 1, "--workers", 0, "--wandb", "off")  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "job", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ(),
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stderr
        assert any(line.startswith(b"rate ") for line in process.stdout)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 74
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    done = gammaslim(*args)
    assert done.code == 0, done
    assert "resuming in the base" in done.out


def test_predictions_on_standard_output_are_a_csv_and_nothing_else(
    finished_run: Path, flat_data: Path, tmp_path: Path
) -> None:
    args = ("predict", finished_run, "--data", flat_data, "--split", "testing")
    assert gammaslim(*args, "--output", tmp_path / "p.csv").code == 0
    done = gammaslim(*args, "--output", "-", cwd=tmp_path)
    assert done.code == 0, done
    assert done.out == (tmp_path / "p.csv").read_text()
    assert "5 predictions of the testing split" in done.err
    assert not (tmp_path / "-").exists()


def test_json_is_all_that_is_on_stdout(finished_run: Path, flat_data: Path, tmp_path: Path) -> None:
    """Notes about a weights file go to stderr: here that some of its tensors are not used."""
    state = load_file(finished_run / "rounds" / "00" / "model.safetensors")
    state = {f"net.{key}": value for key, value in state.items()} | {"other": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    args = ("evaluate", tmp_path / "w.safetensors", "--model", "student", "--data", flat_data)
    done = gammaslim(*args, "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["count"] == 15
    assert "left out: 1 tensor outside of net.* (other)" in done.err


def test_evaluate_prints_text_or_json(finished_run: Path, flat_data: Path) -> None:
    text = gammaslim("evaluate", finished_run, "--data", flat_data)
    assert text.code == 0, text
    assert "15 images" in text.out
    record = json.loads(gammaslim("evaluate", finished_run, "--data", flat_data, "--json").out)
    assert record["count"] == 15
    assert [sum(row) for row in record["confusion"]] == [5, 5, 5]
    right = sum(record["confusion"][i][i] for i in range(3))
    assert record["accuracy"] == right / 15
    assert record["class_accuracy"]["2"] == record["confusion"][2][2] / 5
    summary = json.loads((finished_run / "summary.json").read_text())
    last = [summary["base"], *summary["rounds"]][int(summary["recommended"][-2:])]
    assert record["accuracy"] == last["valid_acc"]
    testing = gammaslim(
        "evaluate", finished_run / "rounds" / "00", "--data", flat_data, "--split", "evaluation"
    )
    assert testing.code == 0
    assert "9 images" in testing.out
    unlabelled = gammaslim("evaluate", finished_run, "--data", flat_data, "--split", "testing")
    assert unlabelled.code == 65
    assert "predict" in one_line(unlabelled.err)


def test_predict_writes_the_homeworks_rows(
    finished_run: Path, flat_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new folder" / "pred.csv"
    done = gammaslim(
        "predict", finished_run, "--data", flat_data, "--split", "testing", "--output", output
    )
    assert done.code == 0, done
    rows = list(csv.reader(output.open()))
    assert rows[0] == ["Id", "Category"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "10", "11"]
    assert all(row[1] in "012" for row in rows[1:])
    folder = gammaslim("predict", finished_run, "--data", flat_data, "--output", tmp_path)
    assert folder.code == 73


def test_ids_of_files_with_the_same_number_are_places(finished_run: Path, tmp_path: Path) -> None:
    for name in ("0", "1"):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        for number in range(2):
            file = tmp_path / "data" / "test" / name / f"{number}.png"
            draw_image(np.random.default_rng(0), 0, 40, 40).save(file)
    (tmp_path / "data" / "test" / "0" / "1.png").write_text("no image")
    done = gammaslim(
        "predict", finished_run, "--data", tmp_path / "data", "--output", tmp_path / "p.csv",
        "--on-bad-image", "skip", "--format", "kaggle",
    )  # fmt: skip
    assert done.code == 0, done
    rows = list(csv.reader((tmp_path / "p.csv").open()))[1:]
    assert [row[0] for row in rows] == ["0", "2", "3"]  # the skipped one keeps its place


def test_output_goes_through_links_and_into_pipes(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "target.pt").touch()
    (tmp_path / "link.pt").symlink_to("target.pt")
    assert gammaslim("export", finished_run, "--output", tmp_path / "link.pt").code == 0
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "target.pt").stat().st_size > 100_000
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "copy").open("wb") as copy:
        reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=copy)
    assert gammaslim("export", finished_run, "--output", tmp_path / "pipe").code == 0
    assert reader.wait(timeout=30) == 0
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "copy").stat().st_size > 100_000


def test_every_option_has_its_variable(finished_run: Path, tmp_path: Path) -> None:
    shown = gammaslim("inspect", finished_run, env={"GAMMASLIM_INSPECT_JSON": "1"})
    assert json.loads(shown.out)["model"] == "student"
    env = {"GAMMASLIM_EXPORT_FORMAT": "state-dict", "GAMMASLIM_EXPORT_OUTPUT": "w.pt"}
    assert gammaslim("export", finished_run, env=env, cwd=tmp_path).code == 0


def test_class_folders_are_matched_by_name(tmp_path: Path) -> None:
    from numpy.random import default_rng

    from support.datasets import draw_image

    rng = default_rng(0)
    for split, classes in (("train", "abc"), ("val", "abc"), ("test", "cb")):
        for name in classes:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(6):
                image = draw_image(rng, "abc".index(name), 40, 40)
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    done = gammaslim("prune", "--data", "data", "--base-epochs", 1, "--rounds", 0, cwd=tmp_path)
    assert done.code == 0, done
    (tmp_path / "only").mkdir()
    (tmp_path / "data" / "test").rename(tmp_path / "only" / "test")
    args = ("evaluate", "runs/student-data", "--data", "only", "--split", "testing", "--json")
    record = json.loads(gammaslim(*args, cwd=tmp_path).out)
    assert [sum(row) for row in record["confusion"]] == [0, 6, 6]
    assert record["class_accuracy"]["a"] is None
    (tmp_path / "only" / "test" / "c").rename(tmp_path / "only" / "test" / "cow")
    unknown = gammaslim(*args, cwd=tmp_path)
    assert unknown.code == 65
    assert "'cow'" in one_line(unknown.err)


def test_slim_export_and_the_original_class(finished_run: Path, tmp_path: Path) -> None:
    base = finished_run / "rounds" / "00"
    done = gammaslim("slim", base, "--output", tmp_path / "half", "--target", "width=0.5")
    assert done.code == 0, done
    assert "verified in float64" in done.out
    for name in ("w.pth", "w.safetensors"):
        exported = gammaslim(
            "export", tmp_path / "half", "--format", "state-dict", "--output", tmp_path / name
        )
        assert exported.code == 0, exported
    plain = PlainStudentNet(0.5, 3).eval()
    plain.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    images = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(plain(images), job.load(tmp_path / "half")(images))
    plain.load_state_dict(load_file(tmp_path / "w.safetensors"))
    again = gammaslim(
        "slim", tmp_path / "half", "--output", tmp_path / "more", "--target", "width=0.3"
    )
    assert again.code == 0, again
    card = json.loads((tmp_path / "more" / "model.json").read_text())
    assert card["width"] == 0.3
    assert max(card["layers"]["cnn.4.1"]["out"]) > int(128 * 0.3)  # indices into the base
    assert len(card["layers"]["cnn.4.1"]["out"]) == int(128 * 0.3)
    occupied = gammaslim("slim", base, "--output", tmp_path / "half", "--target", "width=0.5")
    assert occupied.code == 73
    wider = gammaslim(
        "slim", tmp_path / "half", "--output", tmp_path / "x", "--target", "width=0.9"
    )
    assert wider.code == 2
    assert "not below" in one_line(wider.err)


def test_inspect_tells_groups_costs_and_what_is_not_cut(finished_run: Path) -> None:
    text = gammaslim("inspect", finished_run / "rounds" / "01")
    assert text.code == 0, text
    record = json.loads(gammaslim("inspect", finished_run / "rounds" / "01", "--json").out)
    assert record["cost"]["params"] == sum(row["params"] for row in record["layers"])
    groups = {g["group"]: (g["channels"], g["of"]) for g in record["groups"]}
    assert list(groups.values()) == [
        (16, 16), (32, 32), (64, 64), (121, 128), (243, 256), (243, 256), (243, 256), (256, 256),
    ]  # fmt: skip
    assert [g["group"] for g in record["groups"] if g["gamma"] is None] == ["cnn.7.3"]
    assert [b["layer"] for b in record["blocked"]] == ["fc.0"]
    assert "no BatchNorm ranks them" in text.out
    assert f"{record['cost']['params']:,} params" in text.out


def test_a_weights_file_needs_the_network_named(finished_run: Path, tmp_path: Path) -> None:
    weights = finished_run / "rounds" / "01" / "model.safetensors"
    unnamed = gammaslim("inspect", weights)
    assert unnamed.code == 2
    assert "--model student" in one_line(unnamed.err)
    named = gammaslim("inspect", weights, "--model", "student", "--model-arg", "width_mult=0.95")
    assert named.code == 0, named


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["prune", "--rate", "1.5"], 2, "--rate"),
        (["prune", "--policy", "globl"], 2, "uniform"),
        (["prune", "--nope"], 2, "--nope"),
        (["prune", "--rate", "nan"], 2, "not a finite number"),
        (["prune", "--lr", "inf"], 2, "not a finite number"),
        (["prune", "--seed", "18446744073709551616"], 2, "--seed"),
        (["prune", "--model-arg", "width_mult=inf"], 2, "width_mult=inf"),
        (["prune", "--data", ""], 2, "--data is empty"),
        (["prune", "--precision", "fp16"], 2, "needs a GPU"),
        (["prune", "--data", "x" * 300], 66, "File name too long"),
        (["prune", "--output", "x" * 300], 73, "File name too long"),
        (["slim", "missing", "--output", "x", "--target", "width=nan"], 2, "is not a target"),
        (["prune", "--resume", "require", "--dry-run"], 66, "no run in"),
        (["prune", "--model-arg", "width_mult"], 2, "K=V"),
        (["prune", "--image-size", "8"], 2, "32 pixels fit"),
        (["prune", "--rate", "0.01"], 2, "leaves no channel"),
        (["prune", "--num-classes", "3"], 2, "less than the 10"),
        (["prune", "--device", "cuda"], 2, "no CUDA GPU"),
        (["prune", "--precision", "fp16", "--device", "cpu"], 2, "needs a GPU"),
        (["prune", "--data", "missing"], 66, "missing"),
        (["prune", "--config", "hw8"], 66, "demo, hw7"),
        (["prune", "--config", "hw7"], 66, "food-11"),
        (["prune", "--weights", "missing.bin"], 66, "missing.bin"),
        (["prune", "--resume", "require", "--output", "nothing"], 66, "no run in nothing"),
        (["prune", "--output", "/proc/run"], 73, "/proc"),
        (["prune", "--output", "/dev/null/run"], 73, "/dev/null"),
        (["evaluate", "missing"], 66, "missing"),
        (["evaluate", "."], 66, "not a model"),
        (["predict", "missing"], 2, "--output"),
        (["slim", "missing", "--output", "x", "--target", "flops=3"], 2, "is not a target"),
        (["slim", "missing", "--output", "x", "--data", ""], 2, "--data is empty"),
    ],
)
@pytest.mark.sampled(3)
def test_mistakes_end_in_a_documented_code(
    tmp_path: Path, args: list[str], code: int, message: str
) -> None:
    done = gammaslim(*args, cwd=tmp_path)
    assert done.code == code, done
    assert message in done.err
    assert "Traceback" not in done.err
    if code != 2 or "Usage:" not in done.err:
        one_line(done.err)


def test_dry_run_trains_and_writes_nothing(tmp_path: Path) -> None:
    done = gammaslim("prune", "--dry-run", "--output", "deep/run", cwd=tmp_path)
    assert done.code == 0, done
    assert "nothing was trained" in done.out
    assert "171,349" in done.out  # the fifth round's parameters, with 10 classes
    assert list(tmp_path.iterdir()) == []


def test_configuration_comes_from_file_environment_and_options(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        'rounds = 3\nepochs = 7\n[prune]\nbase-epochs = 9\nmodel_arg = ["width_mult=0.9"]\n'
        '[versions]\nanything = "else"\n'
    )
    args = ("prune", "--dry-run", "--config", "my.toml")
    done = gammaslim(*args, cwd=tmp_path)
    assert "9 epochs of base training, then 3 rounds of 7 epochs" in done.out, done
    assert "0.9000" in done.out
    env = {"GAMMASLIM_PRUNE_ROUNDS": "2", "GAMMASLIM_PRUNE_EPOCHS": "4"}
    done = gammaslim(*args, "--epochs", 6, cwd=tmp_path, env=env)
    assert "9 epochs of base training, then 2 rounds of 6 epochs" in done.out, done


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rats = 0.9", "did you mean rate?"),
        ("[prun]\nrate = 0.9", "did you mean prune?"),
        ("rate = 'fast'", "rate = 'fast'"),
        ("rate = 3.0", "rate = 3.0"),
        ("rounds = [1, 2]", "not a whole number"),
        ("epochs = 2.7", "not a whole number"),
        ("rounds = true", "not a whole number"),
        ("rounds = 2.7", "not a whole number"),
        ("seed = 1979-05-27", "not a whole number"),
        ("rate == 3", "not valid TOML"),
        ("prune = 3", "must be a table"),
    ],
)
@pytest.mark.sampled(2)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "my.toml").write_text(text)
    done = gammaslim("prune", "--dry-run", "--config", "my.toml", cwd=tmp_path)
    assert done.code == 78, done
    assert message in one_line(done.err)


def test_a_misspelt_variable_is_named_and_kubernetes_are_left_alone() -> None:
    wrong = gammaslim("prune", "--dry-run", env={"GAMMASLIM_PRUNE_RATES": "0.9"})
    assert wrong.code == 78
    assert (
        "prune does not read GAMMASLIM_PRUNE_RATES: type GAMMASLIM_PRUNE_RATE=0.9 to set --rate, "
        "or unset GAMMASLIM_PRUNE_RATES"
    ) in one_line(wrong.err)
    services = {
        "GAMMASLIM_PRUNE_SERVICE_HOST": "10.0.0.1",
        "GAMMASLIM_PRUNE_PORT_80_TCP_ADDR": "10.0.0.1",
        "GAMMASLIM_PORT": "tcp://10.0.0.1:80",
    }
    assert gammaslim("prune", "--dry-run", env=services).code == 0


def test_the_recipes_are_what_they_say(tmp_path: Path) -> None:
    demo = gammaslim("prune", "--dry-run", "--config", "demo", cwd=tmp_path)
    plain = gammaslim("prune", "--dry-run", cwd=tmp_path)
    free = re.compile(r"[\d.]+ [GT]B is free")  # other tests write too
    assert free.sub("", demo.out) == free.sub("", plain.out)
    write_flat(tmp_path / "food-11", {"training": 2, "validation": 1}, classes=11, size=70)
    done = gammaslim("prune", "--dry-run", "--config", "hw7", cwd=tmp_path)
    assert done.code == 0, done
    assert "homework transforms at 256 pixels" in done.out
    for params in ("256,779", "236,066", "217,850", "200,354", "185,091", "171,606"):
        assert params in done.out


SMALL_DISK = """
mount -t tmpfs -o size=1m tmpfs "$1" || exit 99
"$2" -m job prune --base-epochs 1 --rounds 1 --wandb off --output "$1/run"
echo "code $?"
find "$1/run"
"""


def test_a_full_disk_ends_with_74(tmp_path: Path) -> None:
    """The run lies on a file system of 1 MiB, too small for a model; mounted in a name space."""
    rights = () if os.geteuid() == 0 else ("--map-root-user",)
    done = run(
        "unshare", "--mount", *rights, "bash", "-c", SMALL_DISK, "bash", tmp_path, sys.executable
    )
    assert "code 74" in done.out, done
    assert "free some space" in one_line(done.err)
    assert "rounds/" not in done.out  # nothing half written
    assert ".tmp" not in done.out
