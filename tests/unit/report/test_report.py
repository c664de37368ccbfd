"""The report: true to the run's files, whole, harmless, and never the end of a job."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from support.commands import ROOT, Result, gammaslim, run
from support.datasets import write_noise_idx

FIGURES = [
    "accuracy-bytes", "accuracy-macs", "accuracy-params", "channels", "training-accuracy",
    "training-loss",
]  # fmt: skip
HOSTILE = "<b>é文 $x^$ 'q\" & \n\x1b[31m{0}"


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.images: list[bytes] = []
        self.alts: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.best: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            head, _, content = str(values["src"]).partition(",")
            assert head == "data:image/png;base64"
            self.images.append(base64.b64decode(content))
            self.alts.append(str(values["alt"]))
        self.links += [str(values[key]) for key in ("href", "action") if key in values]
        if tag == "tr":
            self.rows.append([])
            if values.get("class") == "best":
                self.best.append(len(self.rows) - 1)
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def page(path: Path) -> Page:
    """A report that needs nothing but itself."""
    found = Page(path.read_text("utf-8"))
    assert not {"script", "link", "iframe", "object", "form", "b>"} & set(found.tags)
    assert not found.links
    for image in found.images:
        assert Image.open(io.BytesIO(image)).size == (640, 400)
    return found


def entry(number: int, accuracy: float, params: int, **more: Any) -> dict[str, Any]:
    return {
        "round": number, "width": 0.9**number, "channels": 100 - number, "params": params,
        "macs": params * 40, "bytes": params * 4, "valid_acc": accuracy, "valid_loss": 0.5,
        "best_epoch": 1, "step": 20 * (number + 1), "seconds": 3.25,
        **({"valid_acc_pruned": accuracy - 0.1} if number else {}), **more,
    }  # fmt: skip


ENTRIES = (entry(0, 0.9, 1000), entry(1, 0.91, 800), entry(2, 0.895, 600), entry(3, 0.8, 400))


def make_run(
    folder: Path, entries: tuple[dict[str, Any], ...] = ENTRIES, best: int = 2, **more: Any
) -> Path:
    """A run folder as a job leaves it."""
    folder.mkdir(parents=True)
    reason = more.get("reason", "the fewest parameters within 1 point of the base")
    (folder / "config.toml").write_text(
        f'[prune]\nmodel = "student"\nrate = 0.9\n[dataset]\nfingerprint = "{more.get("data", 7)}"'
    )
    status = {"state": more.get("state", "finished"), "exit_code": more.get("code", 0)}
    at = {"round": max(0, len(entries) - 1), "epoch": 1, "step": 80, "time": 1.7e9}
    (folder / "status.json").write_text(json.dumps(status | at))
    lines = []
    for number, e in enumerate(entries):
        for epoch in (0, 1):
            scores = {"train_loss": 1.5, "train_acc": 0.5, "valid_loss": 1.0, "valid_acc": 0.6}
            scores |= {"lr": 0.001, "images_per_second": 900.0, "seconds": 1.5}
            costs = {key: e[key] for key in ("width", "params", "macs")}
            where = {"round": number, "epoch": epoch, "step": 20 * number + 10 * (epoch + 1)}
            lines.append({"event": "epoch", **where, **scores, **costs})
        lines.append({"event": "round", **e})
        model = folder / "rounds" / f"{number:02d}"
        model.mkdir(parents=True)
        name = more.get("layer", "cnn.0")
        widths = {"widths": {name: 10 - number, "fc": 3}, "base": {"widths": {name: 10, "fc": 3}}}
        (model / "model.json").write_text(json.dumps(widths))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if entries:
        summary = {"format": 1, "state": "finished", "base": entries[0], "rounds": entries[1:]}
        chosen = {"recommended": f"rounds/{best:02d}", "reason": reason, "seconds": 123.4}
        (folder / "summary.json").write_text(json.dumps(summary | chosen))
    return folder


def test_the_page_of_a_run_tells_what_its_files_do(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    done = gammaslim("report", folder)
    assert (done.code, done.err) == (0, ""), done
    assert f"report: {folder}/report.html" in done.out
    assert "recommended: rounds/02 (the fewest" in done.out
    found = page(folder / "report.html")
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["base"] == [
        "1.0000", "1,000 (100.0%)", "40,000 (100.0%)", "4,000 (100.0%)", "100", "", "90.00%", "1",
        "", "3",
    ]  # fmt: skip
    assert rows["★ recommended: 2"] == [
        "0.8100", "600 (60.0%)", "24,000 (60.0%)", "2,400 (60.0%)", "98", "79.50%", "89.50%", "1",
        "-0.50", "3",
    ]  # fmt: skip
    assert rows["1"][-2] == "+1.00"
    assert rows["model"] == ["student"]
    assert [found.rows[place][0] for place in found.best] == ["★ recommended: 2"]
    for text in ("★ rounds/02", "the fewest parameters within", "finished at 2023-11-14 22:13:20"):
        assert text in found.text
    files = sorted((folder / "figures").iterdir())
    assert [file.stem for file in files] == FIGURES
    assert sorted(file.read_bytes() for file in files) == sorted(found.images)
    assert any("Output channels" in alt for alt in found.alts)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    history = read_run(make_run(tmp_path / "one"))
    first, second = draw_run(history), draw_run(history)
    assert [figure.png for figure in first] == [figure.png for figure in second]
    assert render(run_page(history, first)) == render(run_page(history, second))
    assert all(not Image.open(io.BytesIO(figure.png)).text for figure in first)  # type: ignore[attr-defined]


def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "new", (), state="running")
    done = gammaslim("report", folder)
    assert (done.code, done.err) == (0, ""), done
    assert "no round is finished yet" in done.out
    found = page(folder / "report.html")
    assert "State: died" in found.text  # no job has it
    assert "No round is finished yet" in found.text
    assert found.images == []
    (folder / "metrics.jsonl").unlink()
    (folder / "status.json").unlink()
    write_run_report(folder)
    assert "State: unknown" in page(folder / "report.html").text


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


def test_what_is_damaged_is_named_and_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "damaged")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1:1] = ["\0\0\0", "[1]", '{"event": "epoch", "round": 0, "epoch": 9, "step": NaN}']
    lines[5] = lines[5].replace("1.5", "NaN")
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "rounds/02/model.json").write_text("{")
    (folder / "config.toml").write_text("= 3")
    (folder / "status.json").write_text("[]")
    summary = json.loads((folder / "summary.json").read_text())
    summary["rounds"][2] = {"round": 3, "params": "many"}
    summary["rounds"].append(entry(4, float("nan"), 10**30))
    (folder / "summary.json").write_text(json.dumps(summary))
    done = gammaslim("report", folder)
    assert done.code == 0, done
    warnings = done.err.splitlines()
    assert all(line.startswith("Warning: ") for line in warnings), done
    for what in (
        "config.toml",
        "line 2 and 1 more are damaged",
        "rounds/02/model.json",
        "left out",
    ):
        assert what in done.err
    history = read_run(folder)
    assert [e.round for e in history.rounds] == [0, 1, 2, 3]  # 3 is in metrics.jsonl
    assert len(history.epochs) == 8
    assert "Caution:" in page(folder / "report.html").text
    random.seed(1)
    for name in ("summary.json", "metrics.jsonl", "status.json", "config.toml"):
        content = bytearray((make_run(tmp_path / name) / name).read_bytes())
        for _ in range(40):
            content[random.randrange(len(content))] = random.choice(b'"}{[,:01en\xff')
        (tmp_path / name / name).write_bytes(content)
        write_run_report(tmp_path / name)
        page(tmp_path / name / "report.html")


def test_names_from_outside_are_only_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=http://x/y>"
    odd = os.fsdecode(b"\xff run")
    folders = [
        make_run(tmp_path / HOSTILE, reason=evil, state=evil, layer="$\\frac$ <b>"),
        make_run(tmp_path / odd),
        make_run(tmp_path / "a_$_$_b"),
    ]
    for folder in folders:
        write_run_report(folder)
        page(folder / "report.html")
    text = (folders[0] / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;é文 $x^$" in text
    assert "\x1b" not in text
    done = gammaslim("report", *folders, cwd=tmp_path)
    assert (done.code, done.err) == (0, ""), done
    assert all(c.isprintable() or c == "\n" for c in done.out)
    found = page(tmp_path / "report.html")
    assert found.rows[1][1].startswith("<b>é")
    assert found.rows[2][1] == "\\xff run"
    assert gammaslim("report", *folders, "--json", cwd=tmp_path).code == 0


def test_several_runs_are_compared(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "run")
    two = make_run(tmp_path / "b" / "run", (entry(0, 0.95, 2000), entry(1, 0.949, 500)), best=1)
    new = make_run(tmp_path / "new", (), state="running", data=8)
    output = tmp_path / "out" / "all runs.html"
    done = gammaslim("report", one, two, new, one, "--output", output, "--json")
    assert (done.code, done.err) == (0, ""), done
    record = json.loads(done.out)
    assert [r["run"] for r in record["runs"]] == [str(one), str(two), "new"]
    assert record["runs"][1]["recommended"] == "rounds/01"
    assert record["runs"][1]["points_lost"] == pytest.approx(0.1)
    assert record["runs"][1]["relative"] == {"params": 0.25, "macs": 0.25, "bytes": 0.25}
    assert record["runs"][2]["base"] is None
    assert record["pareto"]["params"] == [
        {"path": str(one), "round": 3}, {"path": str(two), "round": 1},
        {"path": str(two), "round": 0},
    ]  # fmt: skip
    found = page(output)
    assert found.rows[1][1:] == [
        str(one), "finished", "90.00%", "rounds/02", "600 (60.0%)", "24,000 (60.0%)",
        "2,400 (60.0%)", "89.50%", "-0.50", "",
    ]  # fmt: skip
    assert found.rows[2][-1] == "parameters, MACs, bytes"
    assert found.rows[3][1:4] == ["new", "died, in the base (round 0), epoch 1, step 80", ""]
    assert "validated on 2 different data sets" in found.text
    files = sorted((tmp_path / "out" / "all runs_figures").iterdir())
    assert [file.stem for file in files] == ["pareto-bytes", "pareto-macs", "pareto-params"]
    assert sorted(file.read_bytes() for file in files) == sorted(found.images)
    assert not (one / "report.html").exists()
    text = gammaslim("report", one, two, new, cwd=tmp_path)
    assert [line.split()[1:4] for line in text.out.splitlines()[1:3]] == [
        ["finished", "0.8100", "600"], ["finished", "0.9000", "500"],
    ]  # fmt: skip
    assert [line.split()[-1] for line in text.out.splitlines()[:3]] == ["points", "-0.50", "-0.10"]
    assert page(tmp_path / "report.html").rows == found.rows


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


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["nowhere"], 66, "nowhere does not exist"),
        (["run", "nowhere"], 66, "nowhere does not exist"),
        (["empty"], 66, "empty is not a run folder"),
        (["file"], 66, "file is not a run folder"),
        (["run", "--output", "file/x.html"], 73, "cannot write into"),
        (["run", "--output", "empty"], 73, "is a folder"),
        (["blocked"], 73, "cannot write into"),
        ([], 2, "Missing argument 'RUN…'"),
    ],
)
def test_errors_are_a_line_and_the_documented_code(
    tmp_path: Path, args: list[str], code: int, said: str
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (make_run(tmp_path / "blocked") / "figures").touch()
    done = gammaslim("report", *args, cwd=tmp_path)
    assert done.code == code, done
    assert said in done.err
    assert "Traceback" not in done.err
    assert code == 2 or (done.err.count("\n") == 1 and done.err.startswith("Error: "))
    assert not (tmp_path / "run" / "report.html").exists()


def test_neither_torch_nor_a_home_nor_a_display_is_needed(tmp_path: Path) -> None:
    folder, temporary = make_run(tmp_path / "run"), tmp_path / "tmp"
    temporary.mkdir()
    script = (
        "import sys\nfrom job.cli.main import gammaslim\n"
        f"gammaslim(['report', {str(folder)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'accelerate', 'wandb', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    no_home = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
    env = {**no_home, "MPLCONFIGDIR": "", "MPLBACKEND": "nonsense", "TMPDIR": str(temporary)}
    done = run(sys.executable, "-c", script, env=env)
    assert (done.code, done.err) == (0, ""), done
    assert len(page(folder / "report.html").images) == len(FIGURES)
    assert not list(temporary.iterdir())


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


PRUNE = (
    "--base-epochs", 1, "--rounds", 1, "--epochs", 1, "--batch-size", 16, "--wandb", "off",
    "--model-arg", "base=4", "--workers", 0,
)  # fmt: skip
BREAK = {
    "no matplotlib": "import sys; sys.modules['matplotlib'] = None\n",
    "a full disk": (
        "import job.report.page\n"
        "from job.errors import writing\n"
        "def full(path, content):\n"
        "    with writing(path): raise OSError(28, 'No space left on device')\n"
        "job.report.page.write_bytes = full\n"
    ),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_job_goes_on_without_its_report(tmp_path: Path, how: str) -> None:
    data, output = write_noise_idx(tmp_path / "idx", 32, 12), tmp_path / "run"
    script = BREAK[how] + "from job.__main__ import main\nmain()\n"
    args = ("prune", "--data", data, "--output", output, *PRUNE)
    done = run(sys.executable, "-c", script, *args, env={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done
    warnings = done.err.splitlines()
    assert len(set(warnings)) == len(warnings), done
    assert all("the report is not written, the job continues" in line for line in warnings)
    assert warnings
    assert json.loads((output / "summary.json").read_text())["state"] == "finished"
    assert json.loads((output / "status.json").read_text())["state"] == "finished"
    assert not (output / "report.html").exists()


def test_the_job_writes_it_after_the_base_after_each_round_and_at_its_end(tmp_path: Path) -> None:
    """What is there at each moment is what a later reader finds when the job is killed next."""
    data, output = write_noise_idx(tmp_path / "idx", 32, 12), tmp_path / "run"
    script = (
        "import json, job.pipeline.session as a\n"
        "write = a.write_run_report\n"
        "def tell(run):\n"
        "    write(run)\n"
        "    states = [json.loads((run / n).read_text())['state'] "
        "for n in ('status.json', 'summary.json')]\n"
        "    print('REPORT', *states, len(list((run / 'rounds').iterdir())))\n"
        "a.write_run_report = tell\n"
        "from job.__main__ import main\nmain()\n"
    )
    args = ("prune", "--data", data, "--output", output, *PRUNE, "--rounds", 2)
    done = run(sys.executable, "-c", script, *args, env={"OMP_NUM_THREADS": "1"})
    assert (done.code, done.err) == (0, ""), done
    told = [line for line in done.out.splitlines() if line.startswith("REPORT")]
    states = ("running running 1", "running running 2", "finished finished 3")
    assert told == [f"REPORT {state}" for state in states]
    found = page(output / "report.html")
    assert "State: finished" in found.text
    assert sorted(file.stem for file in (output / "figures").iterdir()) == FIGURES
    before = (output / "report.html").read_bytes()
    again = gammaslim("report", output)  # the same, from outside
    assert again.code == 0, again
    assert (output / "report.html").read_bytes() == before


def merge(folder: Path) -> Result:
    return run(
        "bash", ROOT / "slurm" / "sweep.sh", "--merge", folder,
        env={"SLIM_VENV": str(Path(sys.executable).parent.parent)},
    )  # fmt: skip


def test_a_sweep_is_merged_by_the_report(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep 7"
    for rate in ("0.5", "0.9"):
        make_run(sweep / f"rate-{rate}")
    (sweep / "rate-0.7").mkdir()  # a task that never began
    for _ in range(2):  # figures of the first time are no run
        done = merge(sweep)
        assert done.code == 0, done
        assert [line.split()[0] for line in done.out.splitlines()[1:3]] == ["rate-0.5", "rate-0.9"]
    assert len(page(sweep / "report.html").images) == 3
    shutil.rmtree(sweep / "rate-0.5")
    shutil.rmtree(sweep / "rate-0.9")
    assert merge(sweep).code == 66
    assert merge(tmp_path / "none").code == 66
