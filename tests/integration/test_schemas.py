"""The schemas in the package describe the files of runs, old ones too, and refuse other content."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from job.artifacts.openmetrics import openmetrics_text
from job.artifacts.records import EpochRecord, RoundRecord, StatusRecord
from job.artifacts.schemas import SCHEMA_FOLDER, all_schemas, schema_text
from support.commands import ROOT, gammaslim
from support.datasets import write_noise_idx
from support.report_pages import entry, make_run, write_evaluations

OLD_RUNS = ROOT / "tests" / "support" / "old_runs"


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMA_FOLDER / name).read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def validate(run: Path) -> int:
    """Validate every file of a run that has a schema; return how many there were."""
    count = 0
    for path in sorted(run.rglob("*.json")):
        if (SCHEMA_FOLDER / path.name).exists() and path.parent.parent.name in (
            "rounds", run.parent.name,
        ):  # fmt: skip
            validator(path.name).validate(json.loads(path.read_text()))
            count += 1
    for line in lines(run / "metrics.jsonl"):
        validator("metrics.json").validate(line)
    return count


def test_the_files_are_those_that_the_records_give() -> None:
    """To renew them: ``python -m job.artifacts.schemas``."""
    schemas = all_schemas()
    assert sorted(path.name for path in SCHEMA_FOLDER.iterdir()) == sorted(schemas)
    for name, schema in schemas.items():
        assert (SCHEMA_FOLDER / name).read_text("utf-8") == schema_text(schema), name


def test_a_run_is_valid(finished_run: Path) -> None:
    """status, summary, and for each of three models: model, evaluation; for two: sensitivity."""
    assert validate(finished_run) >= 2 + 3 * 2
    done = gammaslim("status", finished_run, "--json")
    validator("run_status.json").validate(json.loads(done.out))


@pytest.mark.parametrize("name", ["finished", "stopped"])
def test_runs_of_earlier_versions_are_valid(name: str) -> None:
    assert validate(OLD_RUNS / name) >= 4


def test_a_json_log_is_valid(tmp_path: Path) -> None:
    done = gammaslim(
        "prune", "--data", write_noise_idx(tmp_path / "d", 32, 12), "--output", tmp_path / "run",
        "--base-epochs", 1, "--rounds", 1, "--epochs", 1, "--wandb", "off", "--workers", 0,
        "--model-arg", "base=4", "--log", "json", env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.code == 0, done
    check, events = validator("log.json"), []
    for line in [*done.out.splitlines(), *done.err.splitlines()]:
        check.validate(json.loads(line))
        events.append(json.loads(line)["event"])
    assert {"message", "epoch", "slim", "round", "summary"} <= set(events)
    assert not any("rate 1.0000 epoch" in line for line in done.out.splitlines())
    assert validate(tmp_path / "run") >= 6


def test_a_timed_round_is_valid(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_evaluations(run)
    for name in ("latency.json", "evaluation.json"):
        validator(name).validate(json.loads((run / "rounds" / "02" / name).read_text()))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", {"state": "running", "round": "1"}),
        ("summary.json", {"state": "finished"}),
        ("metrics.json", {"event": "epoch", "round": 0}),
        ("metrics.json", {"event": "unheard", "round": 0}),
        ("log.json", {"time": 1.0, "event": "message"}),
        ("model.json", {"format": 2, "model": "student"}),
    ],
)
def test_other_content_is_refused(name: str, content: dict[str, Any]) -> None:
    assert not validator(name).is_valid(content)


SAMPLE = re.compile(
    r'(?P<name>gammaslim_[a-z_]+)\{run="(?P<run>(?:[^"\\\n]|\\[\\"n])*)"(?:,state="[a-z]+")?\} '
    r"(?P<value>-?[0-9.]+(?:e[+-]?[0-9]+)?)"
)


def samples(text: str) -> dict[str, list[float]]:
    """The samples by name; each family has its HELP and TYPE once, before its samples."""
    assert text.endswith("\n# EOF\n")
    found: dict[str, list[float]] = {}
    family = ""
    for line in text.splitlines()[:-1]:
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert family not in found
        elif line.startswith("# TYPE "):
            assert line == f"# TYPE {family} gauge"
            found[family] = []
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match["name"] == family
            found[family].append(float(match["value"]))
    return found


def test_a_run_has_metrics_for_prometheus(finished_run: Path) -> None:
    found = samples((finished_run / "metrics.prom").read_text())
    assert found["gammaslim_state"] == [0, 0, 1, 0]
    assert found["gammaslim_exit_code"] == [0]
    last = [e for e in lines(finished_run / "metrics.jsonl") if e["event"] == "epoch"][-1]
    assert found["gammaslim_valid_acc"] == [last["valid_acc"]]
    summary = json.loads((finished_run / "summary.json").read_text())
    assert found["gammaslim_params"] == [summary["rounds"][-1]["params"]]


def test_a_name_is_escaped_and_what_is_no_number_left_out() -> None:
    costs = {k: v for k, v in entry(1, 0.5, 100).items() if k != "cautions"}
    epoch = EpochRecord(
        round=1, epoch=0, step=5, train_loss=float("nan"), train_acc=0.5, valid_loss=1e-7,
        valid_acc=0.5, lr=1e-5, images_per_second=float("inf"), seconds=1.0, width=1.0, params=5,
        macs=7,
    )  # fmt: skip
    status = StatusRecord("running", None, 1, 0, 5, 1.5e9)
    text = openmetrics_text('a "b" \\ c\nd', status, epoch, RoundRecord(**costs))
    found = samples(text)
    assert "gammaslim_train_loss" not in found
    assert "gammaslim_images_per_second" not in found
    assert found["gammaslim_valid_loss"] == [1e-7]
    assert 'run="a \\"b\\" \\\\ c\\nd"' in text
