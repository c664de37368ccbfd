"""Runs compared: found under a folder, as a page, CSV and JSON, with the options that differ."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from support.commands import gammaslim
from support.report_pages import ENTRIES, entry, make_run, page, write_evaluations


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two runs at different depths, of which one was timed; a folder of figures is no run."""
    one = make_run(tmp_path / "sweep" / "a")
    two = make_run(
        tmp_path / "sweep" / "more" / "b", (entry(0, 0.95, 2000), entry(1, 0.949, 500)), best=1
    )
    write_evaluations(one)
    config = (two / "config.toml").read_text()
    options = 'rate = 0.8\noutput = "x"\nmodel_arg = ["base=8", "width=2"]'
    (two / "config.toml").write_text(config.replace("rate = 0.9", options))
    (tmp_path / "sweep" / "figures").mkdir()
    return tmp_path / "sweep"


def test_the_runs_under_a_folder_are_compared(sweep: Path, tmp_path: Path) -> None:
    done = gammaslim("report", sweep, sweep / "a", "--json", cwd=tmp_path)
    assert (done.code, done.err) == (0, ""), done
    record = json.loads(done.out)
    assert [run["run"] for run in record["runs"]] == ["a", "b"]
    assert record["runs"][0]["latency"] == {"rounds/00": 0.02, "rounds/02": 0.0125}
    assert record["runs"][0]["relative"]["latency"] == 0.625
    assert record["options"] == {"rate": ["0.9", "0.8"], "model-arg": ["not set", "base=8 width=2"]}
    assert record["pareto"]["latency"] == [
        {"path": str(sweep / "a"), "round": 2}, {"path": str(sweep / "a"), "round": 0},
    ]  # fmt: skip
    found = page(tmp_path / "report.html")
    place = found.rows.index(["", "run", "--rate", "--model-arg"])
    assert found.rows[place + 1 :] == [
        ["1", "a", "0.9", "not set"], ["2", "b", "0.8", "base=8 width=2"],
    ]  # fmt: skip
    assert sorted(found.charts) == [
        "pareto-bytes", "pareto-latency", "pareto-macs", "pareto-params",
    ]  # fmt: skip
    assert "12.5 ms (62.5%)" in found.rows[1]
    with Image.open(tmp_path / "report_figures" / "comparison.png") as figure:
        assert figure.size == (4 * 640, 400)  # a panel for each cost


def test_the_csv_has_a_line_for_each_model(sweep: Path, tmp_path: Path) -> None:
    done = gammaslim("report", sweep, "--csv", "-", cwd=tmp_path)
    assert (done.code, done.err) == (0, ""), done
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert len(rows) == 6
    assert [row["round"] for row in rows if row["recommended"] == "1"] == ["2", "1"]
    best = rows[2]
    assert (best["run"], best["valid_acc"]) == ("a", "0.895")
    assert (best["latency"], best["pareto_latency"], best["pareto_params"]) == ("0.0125", "1", "0")
    assert (best["points"], best["rate"], rows[5]["rate"]) == ("-0.5", "0.9", "0.8")
    again = gammaslim("report", sweep, "--csv", tmp_path / "runs.csv", cwd=tmp_path)
    assert (tmp_path / "runs.csv").read_text() == done.out
    assert "--rate" in again.out
    assert "12.5 ms" in again.out


def test_latencies_of_different_moments_are_compared_by_their_shares(tmp_path: Path) -> None:
    """The same base took 6.50 ms in one run and 2.79 ms in the other."""
    times = {"a": (0.0065, 0.0039), "b": (0.00279, 0.00195)}
    for name, seconds in times.items():
        write_evaluations(make_run(tmp_path / name))
        for number, value in zip((0, 2), seconds, strict=True):
            file = tmp_path / name / "rounds" / f"{number:02d}" / "latency.json"
            file.write_text(json.dumps({"seconds": value, "device": "cpu"}))
    done = gammaslim("report", tmp_path, "--output", tmp_path / "c.html", "--json")
    assert (done.code, done.err) == (0, ""), done
    record = json.loads(done.out)
    front = [(Path(model["path"]).name, model["round"]) for model in record["pareto"]["latency"]]
    assert front == [("a", 2), ("a", 0), ("b", 0)]
    assert record["runs"][1]["latency"] == {"rounds/00": 0.00279, "rounds/02": 0.00195}
    assert record["runs"][0]["latency_of_base"] == pytest.approx(
        {"rounds/00": 1.0, "rounds/02": 0.6}
    )
    (note,) = record["notes"]
    assert note.startswith("latencies are compared as shares of each run's own base")
    found = page(tmp_path / "c.html")
    assert note[1:] in found.text
    assert [row[-1].endswith("latency") for row in found.rows[1:3]] == [True, False]
    assert "against latency relative to the run's own base" in found.charts["pareto-latency"]
    table = gammaslim("report", tmp_path, "--output", tmp_path / "c.html", "--csv", "-")
    rows = {(row["run"], row["round"]): row for row in csv.DictReader(io.StringIO(table.out))}
    assert float(rows["a", "2"]["latency_of_base"]) == pytest.approx(0.6)
    assert rows["a", "1"]["latency_of_base"] == ""
    optimal = [model for model, row in rows.items() if row["pareto_latency"] == "1"]
    assert optimal == [("a", "0"), ("a", "2"), ("b", "0")]
    text = gammaslim("report", tmp_path, "--output", tmp_path / "c.html").out
    assert "3.9 ms (60.0%)" in text
    assert note in text


def test_runs_with_the_same_options_have_no_table_of_options(tmp_path: Path) -> None:
    for name in "ab":
        make_run(tmp_path / name)
    done = gammaslim("report", tmp_path, "--output", tmp_path / "c.html", "--json")
    assert json.loads(done.out)["options"] == {}
    assert "Options that differ between" not in page(tmp_path / "c.html").text


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    done = gammaslim("report", tmp_path / "empty")
    assert (done.code, done.out) == (66, "")
    assert "is not a run folder, and has none inside" in done.err


def test_runs_of_different_metrics_have_fronts_of_their_own(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    worse = tuple({**e, "valid_acc": e["valid_acc"] / 2, "metric": "miou"} for e in ENTRIES)
    run = make_run(tmp_path / "b", worse)
    for name in ("metrics.jsonl", "summary.json"):
        file = run / name
        file.write_text(file.read_text().replace("valid_acc", "valid_miou"))
    done = gammaslim("report", tmp_path, "--output", tmp_path / "c.html", "--json")
    assert (done.code, done.err) == (0, ""), done
    record = json.loads(done.out)
    assert {Path(model["path"]).name for model in record["pareto"]["params"]} == {"a", "b"}
    assert "each metric (acc, miou) has a Pareto front of its own" in record["notes"]
    assert "with the Pareto front" not in page(tmp_path / "c.html").charts["pareto-params"]


def test_a_run_without_rounds_does_not_count_as_another_metric(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", tuple({**e, "metric": "miou"} for e in ENTRIES))
    for name in ("metrics.jsonl", "summary.json"):
        file = run / name
        file.write_text(file.read_text().replace("valid_acc", "valid_miou"))
    make_run(tmp_path / "b", (), state="running")
    done = gammaslim("report", tmp_path, "--output", tmp_path / "c.html", "--json")
    assert done.code == 0, done
    assert not any("each metric" in note for note in json.loads(done.out)["notes"])
    assert "with the Pareto front" in page(tmp_path / "c.html").charts["pareto-params"]
