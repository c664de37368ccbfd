"""The report: true to the run's files, whole, harmless, and never the end of a job."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from PIL import Image

from job.artifacts.run_directory import Run
from job.artifacts.run_reader import read_run
from job.errors import StorageError
from job.pipeline.forecast import Forecast
from job.pipeline.session import Session
from job.pipeline.session_state import Place, SessionState
from job.report import figures
from job.report.chart import Axis, Chart, PlotSeries, Section
from job.report.comparison import pareto_front, pareto_models
from job.report.comparison_page import comparison_page
from job.report.configuration import changed_options, grouped_options
from job.report.drawing import draw_charts
from job.report.figures import comparison_charts, run_charts
from job.report.page import write_run_report
from job.report.run_page import run_page
from support.report_pages import (
    ENTRIES,
    Page,
    check_figures,
    entry,
    make_run,
    page,
    write_evaluations,
)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    history = read_run(make_run(tmp_path / "one"))
    charts = run_charts(history)
    first, second = draw_charts(charts), draw_charts(charts)
    assert first == second
    assert run_page(history, charts) == run_page(history, run_charts(history))
    assert all(not Image.open(io.BytesIO(image)).text for image in first)  # type: ignore[attr-defined]


def test_each_figure_of_the_table_is_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axis, line = Axis("x"), PlotSeries("line", ((0.0, 1.0), (1.0, 2.0)), "blue")
    for section in get_args(Section):
        chart = Chart(f"new-{section}", f"Added to {section}", axis, axis, (line,), section=section)
        entries = (*figures.RUN_FIGURES, lambda _, chart=chart: chart)
        monkeypatch.setattr(figures, "RUN_FIGURES", entries)
    folder = make_run(tmp_path / "run", best=2)
    write_run_report(folder)
    text = (folder / "report.html").read_text()
    drawn = [path.stem for path in (folder / "figures").glob("*.png")]
    assert len(drawn) == len(run_charts(read_run(folder))) > 4
    assert all(text.count(f"Added to {section}") >= 1 for section in get_args(Section))
    assert text.count("<svg") >= len(drawn)


def write_sensitivity(folder: Path, round_index: int, **more: Any) -> None:
    """Put the file of a round that was measured, of seven groups, into a run."""
    groups = [
        {"group": f"layer {number} <$x^$>", "channels": 8, "macs": 0.125, "params": 0.25,
         "points": [{"fraction": f, "channels": int(8 * f), "loss": 10.0**-number * (1 - f)}
                    for f in (0.75, 0.5, 0.0)],
         "kept": 5 + number % 2}
        for number in range(7)
    ]  # fmt: skip
    record = {"loss": "kl", "images": 16, "fractions": [0.75, 0.5, 0.0], "target": None}
    path = folder / "rounds" / f"{round_index:02d}" / "sensitivity.json"
    path.write_text(json.dumps(record | {"groups": groups} | more))


def test_what_the_cut_of_the_recommended_round_measured_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", best=2)
    write_run_report(folder)
    assert not (folder / "figures" / "sensitivity.png").exists()
    for number in (1, 2, 3):
        write_sensitivity(folder, number, images=10 + number)
    write_run_report(folder)
    found = page(folder / "report.html")
    check_figures(found, folder / "figures")
    assert "Most sensitive: layer 0 <$x^$>, layer 1" in found.charts["sensitivity"]
    text = "before the cut of round 2: loss of the outputs (KL divergence of the softmax, in nats)"
    assert f"{text} on 12 images" in found.text
    header = ["group", "channels", "MACs", "params", "75 %", "50 %", "0 %", "kept"]
    place = found.rows.index(header)
    row = ["layer 1 <$x^$>", "8", "12.5%", "25.0%", "0.025", "0.05", "0.1", "6"]
    assert found.rows[place + 2] == row
    (folder / "rounds" / "02" / "sensitivity.json").write_text("{")
    history = read_run(folder)
    assert history.measured
    assert history.measured.round == 3  # the last one
    assert len(history.problems) == 1
    assert "02/sensitivity.json cannot be read" in history.problems[0]


@pytest.mark.parametrize(
    "more",
    [
        {"images": -1},
        {"images": 10**30},
        {"fractions": [float("nan")]},
        {"groups": [{"group": "a", "channels": 2, "macs": 0.1, "params": float("inf"),
                     "points": []}]},
        {"groups": [{"group": "a", "channels": 2, "macs": 0.1, "params": 0.1,
                     "points": [{"fraction": 1, "channels": 1, "loss": float("nan")}]}]},
        {"groups": 3},
    ],
)  # fmt: skip
def test_a_damaged_measurement_is_named_and_left_out(tmp_path: Path, more: dict[str, Any]) -> None:
    folder = make_run(tmp_path / "run")
    write_sensitivity(folder, 2, **more)
    history = read_run(folder)
    assert history.measured is None
    assert len(history.problems) == 1
    write_run_report(folder)
    assert not (folder / "figures" / "sensitivity.png").exists()


def test_groups_without_losses_are_not_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    group = {"channels": 2, "macs": 0.1, "params": 0.1}
    unknown = {"fraction": 0.5, "channels": 1, "loss": None}
    zero = {"fraction": 0.5, "channels": 1, "loss": 0.0}
    rows = [{"group": "a", **group, "points": []}, {"group": "b", **group, "points": [unknown]}]
    write_sensitivity(folder, 2, groups=rows)
    write_run_report(folder)
    assert not (folder / "figures" / "sensitivity.png").exists()
    rows.append({"group": "c", **group, "points": [zero]})
    write_sensitivity(folder, 2, groups=rows)
    write_run_report(folder)
    assert (folder / "figures" / "sensitivity.png").exists()


def test_a_killed_run_without_summary_and_with_a_torn_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "killed", ENTRIES[:2], state="failed", code=74)
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "round": 2, "wid')
    history = read_run(folder)
    assert [e.round for e in history.rounds] == [0, 1]
    assert (history.best, history.problems) == (None, ())
    write_run_report(folder)
    found = page(folder / "report.html")
    assert "State: failed (exit code 74)" in found.text
    assert [row[0] for row in found.rows[1:3]] == ["base", "1"]
    assert not found.best


def test_the_pareto_front_is_what_no_other_model_beats() -> None:
    rng = random.Random(3)
    for _ in range(50):
        points = [(rng.randrange(8), rng.randrange(8)) for _ in range(rng.randrange(1, 12))]
        front = [points[place] for place in pareto_front(points)]
        beaten = {
            p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
        }
        assert sorted(front) == sorted(p for p in points if p not in beaten)  # of equal ones all


def test_many_runs_are_drawn_by_number(tmp_path: Path) -> None:
    history = read_run(make_run(tmp_path / "one"))
    many = [history] * 40
    charts = comparison_charts(many)
    assert len(charts) == len(draw_charts(charts)) == 3
    assert len(pareto_models(many)["params"]) == 3 * len(many)  # none beats the others
    assert len(charts[0].series[-1].points) == 3
    assert len(Page(comparison_page(many, charts).decode()).rows) == 41


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_report_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    write_run_report(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "summary.json").unlink()
    monkeypatch.setattr("job.files.os.fsync", full_disk)
    with pytest.raises(StorageError, match="free some space"):
        write_run_report(folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == {path: c for path, c in before.items() if path.name != "summary.json"}


def test_what_a_killed_job_left_of_figures_is_cleared_away(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "figures").mkdir()
    (folder / "figures" / ".channels.png.17.tmp").touch()
    Run(folder).remove_unfinished()
    assert not list((folder / "figures").iterdir())


def session(folder: Path, held: bool = True, lost: bool = False) -> Session:
    """A session that holds the run in ``folder``, without all else that a job has."""
    found = object.__new__(Session)
    found.run, found.state = Run(folder), SessionState(Forecast(1, 1, 1), Place(), None)
    found.lock = SimpleNamespace(held=held, lost=lost)  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    "error", [RuntimeError("no\nway"), MemoryError(), KeyError("x"), OSError(5)]
)
def test_whatever_the_report_raises_is_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr("job.pipeline.session.write_run_report", fail)
    writer = session(tmp_path)
    for _ in range(3):
        writer.report()
    said = capsys.readouterr().err
    assert said.startswith("Warning: the report is not written, the job continues: ")
    assert said.count("\n") == 1


def test_only_the_process_that_holds_the_run_writes_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for held, lost in ((False, False), (True, True)):
        session(folder, held, lost).report()
        assert not (folder / "report.html").exists()
    session(folder).report()
    assert (folder / "report.html").exists()


def test_the_page_shows_what_the_recommended_model_gets_wrong(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_evaluations(folder)
    write_run_report(folder)
    found = page(folder / "report.html")
    assert ["latency", "20 ms", "12.5 ms", "× 0.625"] in found.rows
    assert "62.5% of the latency" in found.text
    assert "10 values up to 2, 1 zero; recommended: 8 values" in found.charts["gamma"]
    place = found.rows.index(
        ["class", "images", "base", "recommended", "points", "most often misclassified as"]
    )
    assert found.rows[place + 1 : place + 4] == [
        ["wide\\nbag", "2", "100.0%", "0.0%", "-100.00", "T-shirt <b> (1), trouser (1)"],
        ["T-shirt <b>", "4", "75.0%", "75.0%", "+0.00", "wide\\nbag (1)"],
        ["trouser", "4", "75.0%", "100.0%", "+25.00", "none"],
    ]
    rows = [row for row in found.rows if row[0] == "0 T-shirt <b>"]
    assert rows == [["0 T-shirt <b>", "3", "1", ""], ["0 T-shirt <b>", "3", "", "1"]]
    assert len(found.images) == 2
    assert "Only the base is right: 2 validation images, 1 shown" in found.text
    assert "Only the recommended model is right: 1 validation image" in found.text
    assert found.alts == ["Image 8.png <b>", "Image 5.png"]


def test_where_the_base_is_recommended_the_best_round_and_the_last_one_are_shown(
    tmp_path: Path,
) -> None:
    entries = (entry(0, 0.9, 1000), entry(1, 0.885, 800), entry(2, 0.5, 600))
    reason = "the base: every round falls more than 1 point below it"
    folder = make_run(tmp_path / "run", entries, best=0, reason=reason)
    write_evaluations(folder)
    write_run_report(folder)
    found = page(folder / "report.html")
    assert f"Recommended: ★ rounds/00, {reason}." in found.text
    said = "No round kept the accuracy: the best one is round 1, with 88.50% (-1.50 points)."
    assert said in found.text
    assert found.rows[:3] == [
        ["", "★ base", "round 1", "change"],
        ["accuracy", "90.00%", "88.50%", "-1.50 points"],
        ["parameters", "1 k", "800", "× 0.800"],
    ]
    assert not any("★ slim" in row for row in found.rows)
    assert "cnn.0 keeps 8 of 10" in found.charts["channels"]
    assert "each layer of the model of the last round, and of the base" in found.charts["channels"]
    assert "1 zero; round 2: 8 values" in found.charts["gamma"]
    head = ["class", "images", "base", "round 2", "points", "most often misclassified as"]
    assert head in found.rows
    assert "Last: round 2" in found.text
    assert "Only the model of the last round is right: 1 validation image" in found.text


def test_a_base_without_rounds_is_shown_alone(tmp_path: Path) -> None:
    reason = "the base: no round is finished"
    folder = make_run(tmp_path / "run", ENTRIES[:1], best=0, reason=reason)
    write_run_report(folder)
    found = page(folder / "report.html")
    assert found.rows[:2] == [["", "★ base"], ["accuracy", "90.00%"]]
    assert "No round kept" not in found.text


@pytest.mark.parametrize(
    "more",
    [
        {"counts": [-1, 4, 2]},
        {"errors": {"index": [1], "label": [0, 1], "predicted": [1, 0]}},
        {"errors": {"index": [1], "label": [7], "predicted": [1]}},
        {"errors": {"index": [1, 2, 3], "label": [2, 2, 2], "predicted": [1, 1, 1]}},
        {"gamma": {"count": 1, "zeros": 0, "max": 1.0, "bins": [-1]}},
        {"examples": 3},
    ],
)  # fmt: skip
def test_a_damaged_evaluation_is_named_and_left_out(tmp_path: Path, more: dict[str, Any]) -> None:
    folder = make_run(tmp_path / "run")
    write_evaluations(folder, **more)
    history = read_run(folder)
    assert list(history.evaluations) == [0]
    assert len(history.problems) == 1
    write_run_report(folder)
    page(folder / "report.html")


def test_an_image_is_shown_only_if_it_is_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    bad = {"name": "x", "label": 2, "base": 2, "predicted": 0}
    images = ("https://a.b/c.png", 'data:image/png;base64,A"onerror="x', "data:text/html;base64,AA")
    write_evaluations(folder, examples=[{**bad, "image": image} for image in images])
    write_run_report(folder)
    assert page(folder / "report.html").images == []


def test_the_options_that_were_changed_come_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("rate = 0.9", "rate = 0.9\nepochs = 5\nnew = 1"))
    history = read_run(folder)
    assert changed_options(history) == [("--rate", "0.9", "0.95"), ("--new", "1", "not set")]
    groups = dict(grouped_options(history))
    assert groups["Training"] == [("--epochs", "5")]
    assert list(groups) == ["Model", "Training", "Slimming", "Other"]
