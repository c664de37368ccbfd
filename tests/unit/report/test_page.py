"""The report: true to the run's files, whole, harmless, and never the end of a job."""

from __future__ import annotations

import io
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from job.artifacts.run_directory import Run
from job.artifacts.run_reader import read_run
from job.errors import StorageError
from job.pipeline.forecast import Forecast
from job.pipeline.session import Session
from job.pipeline.session_state import Place, SessionState
from job.report.comparison import pareto_front, pareto_models
from job.report.figures import draw_comparison, draw_run
from job.report.page import comparison_page, render, run_page, write_run_report
from support.report_pages import ENTRIES, Page, make_run, page


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    history = read_run(make_run(tmp_path / "one"))
    first, second = draw_run(history), draw_run(history)
    assert [figure.png for figure in first] == [figure.png for figure in second]
    assert render(run_page(history, first)) == render(run_page(history, second))
    assert all(not Image.open(io.BytesIO(figure.png)).text for figure in first)  # type: ignore[attr-defined]


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
        front = {points[place] for place in pareto_front(points)}
        beaten = {
            p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
        }
        assert front == set(points) - beaten


def test_many_runs_are_drawn_by_number(tmp_path: Path) -> None:
    history = read_run(make_run(tmp_path / "one"))
    many = [history] * 40
    figures = draw_comparison(many)
    assert len(figures) == 3
    assert len(pareto_models(many)["params"]) == 3
    assert len(Page(render(comparison_page(many, figures)).decode()).rows) == 41


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
