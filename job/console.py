"""What a person sees: plain lines, one line of progress, the table of rounds."""

from __future__ import annotations

import shutil
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from job.errors import printable
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


LIVE = 0.1  # seconds between drawings on a terminal
LOGGED = 30.0  # seconds between lines in a log
SHORT = 10.0  # seconds: a phase of less gets no line in a log


class _Line:
    """The one line of progress: redrawn in place on a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.phase = self.detail = ""
        self.share: float | None = None  # of the phase that is done
        self.run_left: Callable[[], str] | None = None
        self.drawn = ""  # on the terminal at present
        self.began = self.tick = self.logged = time.monotonic()

    def update(self, phase: str, detail: str = "", share: float | None = None) -> None:
        """Show what is being done, unless the last drawing was just now; main process only."""
        if not is_main():
            return
        with self.lock:
            now, changed = time.monotonic(), (phase, detail) != (self.phase, self.detail)
            if phase != self.phase:
                self.began = now
            self.phase, self.detail, self.share = phase, detail, share
            if _is_terminal(sys.stderr) and (changed or now - self.tick >= LIVE):
                self.tick = now
                self.erase()
                self.draw()
            self._log(now)

    def _log(self, now: float) -> None:
        """In a log, a line every half minute, of phases that take some time."""
        ours = sys.stdout if self.run_left else sys.stderr  # other commands' output is data
        if _is_terminal(ours) and _is_terminal(sys.stderr):
            return
        if now - self.logged >= LOGGED and now - self.began >= SHORT:
            self.logged = now
            with written():
                click.echo(self.text(), err=ours is sys.stderr)

    def text(self) -> str:
        """The phase, how much of it is done, and the time left."""
        left = self.run_left() if self.run_left else self._phase_left()
        share = "" if self.share is None else f"{self.share:.0%}"
        name = ", ".join(part for part in (self.phase, self.detail) if part)
        return "  ".join(part for part in (name, share, left) if part)

    def _phase_left(self) -> str:
        if not self.share:
            return ""
        took = time.monotonic() - self.began
        return f"about {span(took / self.share - took)} left"

    def erase(self) -> None:
        """Empty the line on the terminal, for another writer."""
        if self.drawn:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self.drawn = ""

    def draw(self) -> None:
        """Write the line on the terminal; it must not wrap."""
        if self.phase and _is_terminal(sys.stderr):
            self.drawn = printable(self.text())[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(self.drawn)
            sys.stderr.flush()


_line = _Line()


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


@contextmanager
def written() -> Iterator[None]:
    """A context for whoever else writes on the terminal: the line of progress is out of the way."""
    with _line.lock:
        _line.erase()
        yield
        _line.draw()


def say(text: str) -> None:
    """Print a line, on the main process only."""
    if is_main():
        with written():
            click.echo(text)


def warn(text: str) -> None:
    """Print a line on stderr that begins with "Warning: ", from any process."""
    with written():
        fresh_line()
        click.echo(f"Warning: {printable(text)}", err=True)


def say_cautions(cautions: Iterable[str | None]) -> None:
    """Print each caution that there is on a line."""
    for caution in cautions:
        if caution:
            say(f"caution: {caution}")


def tell_error(text: str) -> None:
    """Print a line on stderr that begins with "Error: "; text from outside may be in it."""
    fresh_line()
    click.echo(f"Error: {printable(text)}", err=True)


def fresh_line() -> None:
    """On a terminal, clear what this process or another one has drawn on the present line."""
    with _line.lock:
        _line.drawn = ""
        if _is_terminal(sys.stderr):
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def phase(name: str, detail: str = "", share: float | None = None) -> None:
    """Show what is being done until the next phase; "" when nothing is."""
    if name:
        _line.update(name, detail, share)
    else:
        with _line.lock:
            _line.erase()
            _line.phase = _line.detail = ""


def show_step(name: str, step: str, number: int = 0, count: int = 0) -> None:
    """Show a step of the phase ``name``, and which of how many such steps it is."""
    phase(name, step + (f" {number} of {count}" if count else ""))


def tick(done: int, count: int) -> None:
    """Show how much of the present phase is done."""
    _line.update(_line.phase, _line.detail, done / count if count else None)


@contextmanager
def run_progress(left: Callable[[], str]) -> Iterator[None]:
    """A context in which the time left is that of a whole run, as ``left`` words it.

    Python's own warnings keep off the line of progress too.
    """
    show = warnings.showwarning

    def showwarning(*args: Any, **more: Any) -> None:
        with written():
            fresh_line()
            show(*args, **more)

    _line.run_left = left
    if _is_terminal(sys.stderr):
        warnings.showwarning = showwarning
    try:
        yield
    finally:
        phase("")
        _line.run_left = None
        warnings.showwarning = show


def progress(name: str, detail: str = "") -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """Shows how many of (items, count) are done, and the time left."""

    def counted(items: Iterable[Any], count: int) -> Iterator[Any]:
        phase(name, detail)
        for done, item in enumerate(items, start=1):
            yield item
            phase(name, detail, done / count if count else None)
        if not _line.run_left:
            phase("")

    return counted


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def span(seconds: float) -> str:
    """A time in words, to about two digits: 40 s, 12 min, 3 h 20 min, 2 days 5 h."""
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


def where(round_: int, epoch: int, step: int) -> str:
    """Where a run is, in words; epochs count from 0, as in ``epoch_line``."""
    name = f"round {round_}" if round_ else "the base (round 0)"
    return f"{name}, epoch {epoch}, step {step}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns under their headings, the first ``left`` flush left, numbers flush right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
