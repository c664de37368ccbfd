"""The report of a run, by the command and by the job: true to the run's files, never its end."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from job.artifacts.run_reader import read_run
from job.report.page import write_run_report
from support.commands import ROOT, Result, gammaslim, run
from support.datasets import write_noise_idx
from support.report_pages import check_figures, entry, make_run, page

FIGURES = [
    "accuracy-bytes", "accuracy-macs", "accuracy-params", "channels", "throughput",
    "training-accuracy", "training-loss",
]  # fmt: skip


HOSTILE = "<b>é文 $x^$ 'q\" & \n\x1b[31m{0}"


def test_the_page_of_a_run_tells_what_its_files_do(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    done = gammaslim("report", folder)
    assert (done.code, done.err) == (0, ""), done
    assert f"report: {folder}/report.html" in done.out
    assert "recommended: rounds/02 (the fewest" in done.out
    found = page(folder / "report.html")
    head = next(place for place, row in enumerate(found.rows) if "loss" in row)
    rows = {row[0]: row[1:] for row in found.rows[head : head + 5]}
    assert rows["base"] == [
        "90.00%", "", "0.5000", "", "1,000", "40,000", "4,000", "1.0000", "100", "1",
    ]  # fmt: skip
    assert rows["★ 2"] == [
        "89.50%", "-0.50", "0.5000", "79.50%", "600 (60.0%)", "24,000 (60.0%)", "2,400 (60.0%)",
        "0.8100", "98", "1",
    ]  # fmt: skip
    assert rows["1"][1] == "+1.00"
    assert found.rows[:5] == [
        ["", "base", "★ slim", "change"],
        ["accuracy", "90.00%", "89.50%", "-0.50 points"],
        ["parameters", "1 k", "600", "× 0.600"],
        ["MACs", "40 k", "24 k", "× 0.600"],
        ["size", "4 kB", "2.4 kB", "× 0.600"],
    ]
    assert ["--rate", "0.9 (default: 0.95)"] in found.rows
    assert ["--model", "student"] in found.rows
    assert not any(row[0] == "--model" and "default" in row[1] for row in found.rows)
    assert [found.rows[place][0] for place in found.best] == ["★ 2"]
    for text in ("★ rounds/02", "the fewest parameters within", "finished at 2023-11-14 22:13:20"):
        assert text in found.text
    assert f"gammaslim.load('{folder}/rounds/02')" in found.text
    assert sorted(found.charts) == FIGURES
    check_figures(found, folder / "figures")
    assert "base: 1 k, 90.00%; round 1: 800, 91.00%" in found.charts["accuracy-params"]
    assert "cnn.0 keeps 8 of 10" in found.charts["channels"]


def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "new", (), state="running")
    done = gammaslim("report", folder)
    assert (done.code, done.err) == (0, ""), done
    assert "no round is finished yet" in done.out
    found = page(folder / "report.html")
    assert "State: died" in found.text  # no job has it
    assert "No round is finished yet" in found.text
    assert (found.images, found.charts) == ([], {})
    (folder / "metrics.jsonl").unlink()
    (folder / "status.json").unlink()
    write_run_report(folder)
    assert "State: unknown" in page(folder / "report.html").text


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
    assert "<script>alert" not in text
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
    assert sorted(found.charts) == ["pareto-bytes", "pareto-macs", "pareto-params"]
    check_figures(found, tmp_path / "out" / "all runs_figures")
    assert not (one / "report.html").exists()
    text = gammaslim("report", one, two, new, cwd=tmp_path)
    assert [line.split()[1:4] for line in text.out.splitlines()[1:3]] == [
        ["finished", "0.8100", "600"], ["finished", "0.9000", "500"],
    ]  # fmt: skip
    assert [line.split()[-1] for line in text.out.splitlines()[:3]] == ["points", "-0.50", "-0.10"]
    assert page(tmp_path / "report.html").rows == found.rows


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
    assert sorted(page(folder / "report.html").charts) == FIGURES
    assert not list(temporary.iterdir())


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
    assert sorted(found.charts) == sorted([*FIGURES, "gamma", "accuracy-latency"])
    assert len(found.images) <= 16
    check_figures(found, output / "figures")
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
    assert len(page(sweep / "report.html").charts) == 3
    shutil.rmtree(sweep / "rate-0.5")
    shutil.rmtree(sweep / "rate-0.9")
    assert merge(sweep).code == 66
    assert merge(tmp_path / "none").code == 66
