"""Progress: one line on a terminal that nobody else writes into, a line now and then in a log."""

from __future__ import annotations

import io
import json
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import job
import job.console as console
from job.models.student import StudentNet
from job.slimming.analysis import analyse
from job.slimming.cut import make_cut, measure_importance
from job.slimming.graph.groups import ChannelGraph
from job.slimming.method import Method
from job.slimming.planned_cut import plan_cut
from job.slimming.planning.allocation import Allocation
from job.slimming.planning.plan import Plan
from job.slimming.planning.target import Budget
from job.slimming.proven_plan import prove_plan


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    monkeypatch.setattr(console, "_line", console._Line())
    return clock


class Terminal(io.StringIO):
    """What is seen at last: standard output and error of a terminal of one row after another."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        rows, column = [""], 0
        text = self.getvalue()
        place = 0
        while place < len(text):
            if text.startswith("\033[K", place):
                rows[-1] = rows[-1][:column]
                place += 3
                continue
            if text.startswith("\033[A", place):  # the row above; those below are empty by then
                assert rows.pop() == ""
                place += 3
                continue
            character = text[place]
            place += 1
            if character == "\n":
                rows.append("")
                column = 0
            elif character == "\r":
                column = 0
            else:
                rows[-1] = rows[-1][:column] + character + rows[-1][column + 1 :]
                column += 1
        return rows


@contextmanager
def on_terminal() -> Iterator[Terminal]:
    """A terminal of 60 columns that this process writes on."""
    both = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "60")
        patch.setattr(sys, "stdout", both)
        patch.setattr(sys, "stderr", both)
        yield both


def test_lines_and_warnings_of_any_thread_keep_off_the_line_of_progress(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(number: int) -> None:
        for _ in range(20):
            console.say(f"line of thread {number}")
            console.warn(f"of thread {number}")

    monkeypatch.setattr(warnings, "showwarning", lambda text, *_: sys.stderr.write(f"{text}\n"))
    with on_terminal() as terminal, console.run_progress(lambda: "about 12 min left"):
        console.phase("round 2 of 5", "proving the cut")
        assert terminal.rows()[-1] == "round 2 of 5, proving the cut  about 12 min left"
        threads = [threading.Thread(target=talk, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for number in range(300):
            clock.now += 1
            console.phase("round 2 of 5", f"reconstructing layer {number} of 300")
        for thread in threads:
            thread.join()
        warnings.showwarning("a library's", UserWarning, "library.py", 1, None, "")
    *rows, last = terminal.rows()
    assert last == ""
    allowed = {f"line of thread {n}" for n in range(3)} | {
        f"Warning: of thread {n}" for n in range(3)
    }
    assert len([row for row in rows if row in allowed]) == 120
    rest = [row for row in rows if row not in allowed]
    assert rest == ["a library's"]


def test_a_line_of_progress_does_not_wrap(clock: Clock) -> None:
    with on_terminal() as terminal:
        console.phase("x" * 200)
        assert terminal.rows() == ["x" * 59]
        console.phase("round 2 of 5", "epoch 1  8,123 images/s  best valid_acc 0.8883", share=0.5)
        assert terminal.rows() == ["round 2 of 5, epoch 1  8,123 images/s"]
        console.phase("")
    assert terminal.rows() == [""]


def test_no_time_is_left_at_the_end(clock: Clock) -> None:
    with on_terminal() as terminal:
        console.phase("evaluating", share=0.5)
        clock.now += 10
        console.phase("evaluating", share=0.6)
        assert terminal.rows()[-1].startswith("evaluating  60%  about ")
        clock.now += 10
        console.phase("evaluating", share=1.0)
        assert terminal.rows()[-1] == "evaluating  100%"


def test_an_error_line_starts_on_a_fresh_line(clock: Clock) -> None:
    """Of the launcher, too, whose process 0 was killed in the middle of its line."""
    with on_terminal() as terminal:
        terminal.write("round 1 of 5  34%")
        console.print_error("process 0 was killed")
    assert terminal.rows() == ["Error: process 0 was killed", ""]


def test_a_log_gets_the_time_left_every_half_minute_and_nothing_of_short_phases(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.run_progress(lambda: "about 12 min left"):
        for second in range(200):
            clock.now = float(second)
            console.phase(
                "round 1 of 5" if second % 35 else "proving the cut", f"epoch {second // 20}"
            )
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err == ""
    assert 3 <= len(lines) <= 6
    assert lines[0] == "round 1 of 5, epoch 1  about 12 min left"
    assert not any("proving" in line for line in lines)
    assert not any(character in said.out for character in "\r\033")


def test_other_commands_keep_progress_off_their_output(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in console.progress("evaluating")(range(100), 100):
        clock.now += 1
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "evaluating  30%  about 70 s left" or lines[0].startswith("evaluating  3")
    assert len(lines) == 3


def test_other_processes_show_no_progress(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(console, "is_main", lambda: False)
    with on_terminal() as terminal:
        console.phase("checking images", share=0.5)
        console.say("a line")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "5 s"), (42, "40 s"), (80, "1 min"), (725, "12 min"), (3 * 3600 + 17 * 60, "3 h 20 min"),
     (7200, "2 h"), (200_000, "2 days 7 h")],
)  # fmt: skip
def test_times_are_in_words(seconds: float, text: str) -> None:
    assert console.span(seconds) == text


def test_a_cut_tells_its_steps_to_a_callback_and_the_library_prints_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    network, image = StudentNet(base=2, num_classes=3), torch.rand(1, 3, 32, 32)
    batches = [torch.rand(8, 3, 32, 32)]
    graph, steps = analyse(network, image), []
    allocation = Allocation("global", Budget("channels", 0.6))
    method = Method("refit", "regress")

    def show(*step: object) -> None:
        steps.append(step)

    scores, data = measure_importance(network, graph, method, lambda: batches, show)

    def plan_of(own: ChannelGraph) -> Plan:
        return plan_cut(network, own, scores, allocation, method, image)

    proven = prove_plan(plan_of, network, graph, image, show)
    make_cut(proven, network, image, method.compensate, data, show)
    names = [name for name, _, _ in steps]
    assert list(dict.fromkeys(names)) == [
        "measuring channels", "proving the cut", "reconstructing layers", "reconstructing layer",
    ]  # fmt: skip
    layers = [(number, count) for name, number, count in steps if name == "reconstructing layer"]
    assert layers == [(number, len(layers)) for number in range(1, len(layers) + 1)]
    assert len(layers) > 3
    job.slim(network, image, target="channels=0.6", calibration=batches)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "image", "1 image"), (0, "image", "0 images"), (1, "class", "1 class"),
     (1200, "class", "1,200 classes"), (2, "loader process", "2 loader processes"),
     (0.9, "second", "1 second"), (float("nan"), "second", "nan seconds")],
)  # fmt: skip
def test_a_number_has_its_noun(number: float, noun: str, text: str) -> None:
    assert console.counted(number, noun) == text


def test_the_live_view_has_a_second_line_and_survives_a_narrower_window(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = "step 1,880  455 images/s  best acc 0.8140"
    with on_terminal() as terminal, console.run_progress(lambda: "about 1 min left", lambda: facts):
        console.say("first line")
        console.phase("round 2 of 5", "epoch 1", 0.5)
        assert terminal.rows()[1:] == ["round 2 of 5, epoch 1  50%  about 1 min left", facts]
        clock.now += 1
        console.say("second line")
        console.phase("round 2 of 5", "epoch 1", 0.6)
        assert terminal.rows()[:2] == ["first line", "second line"]
        assert terminal.rows()[2:] == ["round 2 of 5, epoch 1  60%  about 1 min left", facts]
        monkeypatch.setenv("COLUMNS", "20")  # 44 and 41 letters are wrapped into 3 rows each
        before = len(terminal.getvalue())
        console.phase("")
    assert terminal.getvalue()[before:].count("\033[A") == 5


def test_a_json_log_has_an_object_a_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console.log_as_json(True)
    try:
        with console.run_progress(lambda: "about 12 min left", lambda: "facts"):
            console.say("\na\nb")  # a blank line is for readers of a text log
            console.say("")
            console.say("rate 1.0000 epoch", event=True)
            console.say_event({"event": "epoch", "round": 1, "valid_acc": 0.5})
            console.warn("odd \x1b")
            console.phase("round 1 of 5", "epoch 0", 0.25)
            clock.now = 40.0
            console.phase("round 1 of 5", "epoch 0", 0.5)
        console.print_error("no disk")
    finally:
        console.log_as_json(False)
    said = capsys.readouterr()
    out, err = (list(map(json.loads, text.splitlines())) for text in said)
    assert all(isinstance(line.pop("time"), float) for line in (*out, *err))
    assert out == [
        {"event": "message", "text": "a\nb"},
        {"event": "epoch", "round": 1, "valid_acc": 0.5},
        {"event": "progress", "phase": "round 1 of 5", "share": 0.5,
         "text": "round 1 of 5, epoch 0  50%  about 12 min left"},
    ]  # fmt: skip
    assert err == [
        {"event": "warning", "text": "odd \\x1b"}, {"event": "error", "text": "no disk"},
    ]  # fmt: skip
    console.say_event({"event": "epoch"})
    assert capsys.readouterr().out == ""
