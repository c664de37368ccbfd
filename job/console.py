"""Output of a command: lines, warnings, errors, results, and live progress.

With ``--log json`` each line is a JSON object, described by ``job/schemas/log.json``. Only the
main process prints lines and progress; any process may warn. The logging module is not used: code
of the user's network may configure or disable it, and scripts read these lines.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from job.errors import OutputClosedError, fitted, printable
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

LIVE = 0.1  # seconds between drawings on a terminal
LOGGED = 30.0  # seconds between lines in a log
SHORT = 10.0  # seconds: a shorter phase gets no line in a log
MESSAGE: Mapping[str, object] = {"event": "message"}


class _Line:
    """The one line of progress: redrawn in place on a terminal, printed now and then in a log."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.phase = self.detail = ""
        self.share: float | None = None  # of the phase that is done
        self.run_left: Callable[[], str] | None = None
        self.run_facts: Callable[[], str] | None = None
        self.drawn: list[str] = []  # lines that are on the terminal now
        self.began = self.tick = self.logged = time.monotonic()

    def update(self, phase: str, detail: str = "", share: float | None = None) -> None:
        """Show the current phase, unless the line was drawn a moment ago; main process only."""
        if not is_main():
            return
        with self.lock:
            now, changed = time.monotonic(), (phase, detail) != (self.phase, self.detail)
            if phase != self.phase:
                self.began = now
            self.phase, self.detail, self.share = phase, detail, share
            if self._is_live() and (changed or now - self.tick >= LIVE):
                self.tick = now
                self.erase()
                self.draw()
            self._log(now)

    def _log(self, now: float) -> None:
        """Print the line in a log every half minute, if the phase takes some time."""
        stream = sys.stdout if self.run_left else sys.stderr  # stdout of other commands is data
        if _is_terminal(stream) and self._is_live():
            return
        if now - self.logged >= LOGGED and now - self.began >= SHORT:
            self.logged = now
            event = {"event": "progress", "phase": self.phase, "share": self.share}
            _write(self.text(), err=stream is sys.stderr, event=event)

    def _is_live(self) -> bool:
        """Whether the line is redrawn in place."""
        return _is_terminal(sys.stderr) and not _Lines.as_json

    def text(self) -> str:
        """Return the phase, the share of it that is done, and the time left."""
        left = self.run_left() if self.run_left else self._phase_left()
        share = "" if self.share is None else f"{self.share:.0%}"
        name = ", ".join(part for part in (self.phase, self.detail) if part)
        return "  ".join(part for part in (name, share, left) if part)

    def _phase_left(self) -> str:
        if not self.share or self.share > 0.99:  # the end is near, whatever a span is rounded to
            return ""
        took = time.monotonic() - self.began
        return f"about {span(took / self.share - took)} left"

    def erase(self) -> None:
        """Empty the lines on the terminal, for another writer."""
        if self.drawn:  # a terminal that has become narrower has wrapped them into more rows
            columns = max(1, shutil.get_terminal_size().columns)
            rows = sum(max(1, -(-len(line) // columns)) for line in self.drawn)
            sys.stderr.write("\r\033[K\033[A" * (rows - 1))
            _clear()
            self.drawn = []

    def draw(self) -> None:
        """Write the lines on the terminal, without the last facts where they would wrap."""
        if self.phase and self._is_live():
            columns = shutil.get_terminal_size().columns
            lines = filter(None, (self.text(), self.run_facts() if self.run_facts else ""))
            self.drawn = [fitted(line, columns - 1) for line in lines]
            sys.stderr.write("\n".join(self.drawn))
            sys.stderr.flush()


_line = _Line()


class _Lines:
    on_stderr = False
    as_json = False


def log_as_json(active: bool) -> None:
    """Print each line as a JSON object, and draw nothing on a terminal."""
    _Lines.as_json = active


def say(text: str, *, event: bool = False) -> None:
    """Print a line, on the main process only.

    With ``event``, a JSON log omits the line, because it has an object of `say_event` instead.
    """
    if is_main() and not (_Lines.as_json and (event or not text)):
        _write(text, err=_Lines.on_stderr)


def say_event(values: Mapping[str, object]) -> None:
    """Print an object in a JSON log, nothing in a text log; main process only."""
    if _Lines.as_json and is_main():
        _write(None, err=_Lines.on_stderr, event=values)


def say_aside(text: str) -> None:
    """Print a line that is not part of a command's output on stderr; main process only."""
    if is_main():
        _write(text, err=True)


def say_cautions(cautions: Iterable[str | None]) -> None:
    """Print a line for each caution that is not None."""
    for caution in cautions:
        if caution:
            say(f"caution: {caution}")


def warn(text: str) -> None:
    """Print a line on stderr that begins with "Warning: ", from any process."""
    _write_problem("Warning", text)


def print_error(text: str) -> None:
    """Print a line on stderr that begins with "Error: ", from any process."""
    phase("")
    _write_problem("Error", text)


def print_result(content: str | bytes) -> None:
    """Print the result of a command on stdout, on the main process only; bytes as they are."""
    if is_main():
        with _line_erased():
            _echo(content)


@contextmanager
def lines_on_stderr(active: bool) -> Iterator[None]:
    """Print lines on stderr if ``active``, so that stdout contains only the result."""
    _Lines.on_stderr = active
    try:
        yield
    finally:
        _Lines.on_stderr = False


def _write(text: str | None, *, err: bool = False, event: Mapping[str, object] = MESSAGE) -> None:
    """Write ``text`` on stdout or stderr, or in a JSON log the object ``event`` with it."""
    line = text or ""
    if _Lines.as_json:
        content = {"time": round(time.time(), 3), **event}
        line = json.dumps(content if text is None else content | {"text": text.strip("\n")})
    with _line_erased():
        _echo(line, err=err)


def _echo(content: str | bytes, *, err: bool = False) -> None:
    """Write a line, or bytes; raises OutputClosedError."""
    try:
        click.echo(content, err=err, nl=isinstance(content, str))
    except BrokenPipeError as error:
        raise OutputClosedError("nobody reads the output any more") from error


def _write_problem(kind: str, text: str) -> None:
    with _line.lock:
        _line.erase()
        if _Lines.as_json:
            return _write(printable(text), err=True, event={"event": kind.lower()})
        _clear()  # another process may have drawn on this terminal
        return _write(f"{kind}: {printable(text)}", err=True)  # the text may quote anything


@contextmanager
def _line_erased() -> Iterator[None]:
    """Erase the line of progress while another writer uses the terminal."""
    with _line.lock:
        _line.erase()
        yield
        _line.draw()


def _clear() -> None:
    if _is_terminal(sys.stderr):
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # it does not exist, or is closed
        return False


def phase(name: str, detail: str = "", share: float | None = None) -> None:
    """Show a phase of the work until the next one; "" ends the current phase."""
    if name:
        _line.update(name, detail, share)
    else:
        with _line.lock:
            _line.erase()
            _line.phase = _line.detail = ""


def show_step(name: str, step: str, number: int = 0, count: int = 0) -> None:
    """Show a step of the phase ``name``, and its number if there are several such steps."""
    phase(name, step + (f" {number} of {count}" if count else ""))


def tick(done: int, count: int) -> None:
    """Show how much of the current phase is done."""
    _line.update(_line.phase, _line.detail, done / count if count else None)


@contextmanager
def run_progress(left: Callable[[], str], facts: Callable[[], str] | None = None) -> Iterator[None]:
    """Show the time left in the whole run, which ``left`` returns, instead of in the phase.

    On a terminal, a second line shows the ``facts``, and Python's own warnings do not disturb it.
    """
    show = warnings.showwarning

    def showwarning(*args: Any, **more: Any) -> None:
        with _line_erased():
            _clear()
            show(*args, **more)

    _line.run_left, _line.run_facts = left, facts
    if _is_terminal(sys.stderr):
        warnings.showwarning = showwarning
    try:
        yield
    finally:
        phase("")
        _line.run_left = _line.run_facts = None
        warnings.showwarning = show


def progress(name: str, detail: str = "") -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """Return a function that iterates over (items, count) and shows how many are done."""

    def shown(items: Iterable[Any], count: int) -> Iterator[Any]:
        phase(name, detail)
        for done, item in enumerate(items, start=1):
            yield item
            phase(name, detail, done / count if count else None)
        if not _line.run_left:
            phase("")

    return shown


def counted(number: float, noun: str) -> str:
    """Return a number, rounded, with its noun: 1 epoch, 2 epochs, 2 classes, nan seconds."""
    rounded, ending = f"{number:,.0f}", "es" if noun.endswith("s") else "s"
    return f"{rounded} {noun}" + ("" if rounded == "1" else ending)


def amount(count: int) -> str:
    """Format ``count`` bytes to two digits: 1.2 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{float(f'{count / size:.2g}'):g} {unit}"
    return counted(count, "byte")


def span(seconds: float) -> str:
    """Return a time in words, to about two digits: 40 s, 12 min, 3 h 20 min, 2 days 5 h."""
    minutes = round(seconds / 60)
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} s"
    if minutes < 100:
        return f"{max(1, minutes)} min"
    hours, minutes = divmod(10 * round(minutes / 10), 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a text table; the first ``left`` columns are left-aligned, the rest right-aligned."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
