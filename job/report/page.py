"""What came of one run, or of several beside each other: a page of HTML and figures as PNG.

The page holds its figures and needs nothing else; names in it are quoted, and nothing is executed.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.artifacts.accuracy import signed
from job.artifacts.history import COSTS, History, Round, fronts, incomparable, names, read_run
from job.console import say, table, warn, where
from job.errors import printable, shown, writing
from job.files import check_output, check_writable, write_bytes, write_output
from job.report.figures import Picture, draw_comparison, draw_run
from job.report.tables import rounds_table

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

HEADINGS = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
 max-width: 75rem; padding: 1rem; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: right; }}
td {{ white-space: nowrap; }}
th {{ border-bottom: 2px solid #111; vertical-align: bottom; }}
.name {{ text-align: left; white-space: normal; min-width: 6rem; }}
.best td {{ font-weight: bold; background: #e8f1f8; }}
.figures {{ display: grid; gap: 1rem;
 grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
figure {{ margin: 0; break-inside: avoid; }}
img {{ width: 100%; height: auto; }}
figcaption {{ font-size: .9rem; color: #444; }}
@media print {{ body {{ font-size: 9pt; max-width: none; padding: 0; }}
 .wide {{ overflow: visible; }} th, td {{ padding: .1rem .3rem; }}
 .figures {{ grid-template-columns: 1fr 1fr; }} tr {{ break-inside: avoid; }} }}
</style>
</head>
<body>
"""


def report(paths: Sequence[str], output: str | None, as_json: bool) -> None:
    """Write the report of one run into its folder, or of several into the current one; print it.

    ``output`` is another file for the page; its figures go beside it. Raises InputNotFound,
    OutputError, StorageError, or GammaslimError without matplotlib.
    """
    histories = read_runs(paths)
    alone = histories[0] if len(histories) == 1 else None
    target = Path(output or (alone.path / "report.html" if alone else "report.html"))
    page = check_output(target)
    figures = page.with_name(f"{page.stem}_figures" if output or not alone else "figures")
    keeps_figures = not page.exists() or page.is_file()  # not beside a pipe or a device
    if keeps_figures:
        check_writable(figures)
    pictures = draw_run(alone) if alone else draw_comparison(histories)
    if keeps_figures:
        _write_figures(figures, pictures)
    write_output(page, (run_page if alone else comparison_page)(histories, pictures).encode())
    for history in histories:
        for problem in history.problems:
            warn(problem)
    if as_json:
        say(json.dumps(comparison_record(histories) | {"report": shown(target)}, indent=1))
    else:
        say(_run_text(alone) if alone else _comparison_text(histories))
        say(f"\nreport: {shown(target)}")


def write_run_report(run: Path) -> None:
    """Write ``run``/report.html and ``run``/figures as things stand; raises GammaslimError."""
    history = read_run(run)
    pictures = draw_run(history)
    _write_figures(run / "figures", pictures)
    write_bytes(run / "report.html", run_page([history], pictures).encode())


def read_runs(paths: Sequence[str]) -> list[History]:
    """The runs in ``paths``, each once; raises as ``read_run`` does."""
    unique: dict[str, Path] = {}
    for path in paths:
        unique.setdefault(os.path.realpath(path), Path(path))
    return [read_run(path) for path in unique.values()]


def _write_figures(folder: Path, pictures: Sequence[Picture]) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_bytes(folder / f"{picture.name}.png", picture.png)


def comparison_record(histories: Sequence[History]) -> dict[str, Any]:
    """The comparison as JSON holds it; accuracies are fractions, ``points_lost`` percent points."""
    runs = [
        {
            "run": name,
            "path": shown(history.path),
            "state": history.state,
            "exit_code": history.exit_code,
            "position": dict(zip(("round", "epoch", "step"), history.position or (), strict=False)),
            "base": asdict(history.base) if history.base else None,
            "rounds": [asdict(entry) for entry in history.rounds if entry.round],
            "recommended": f"rounds/{history.best.round:02d}" if history.best else None,
            "reason": history.reason,
            "cautions": list(history.cautions),
            "relative": {c: history.share(history.best, c) for c in COSTS} if history.best else {},
            "points_lost": None if history.change is None else 0.0 - history.change,
            "problems": list(history.problems),
        }
        for name, history in zip(names(histories), histories, strict=True)
    ]
    front = {
        cost: [{"path": runs[place]["path"], "round": round_} for place, round_ in models]
        for cost, models in fronts(histories).items()
    }
    return {"format": 1, "runs": runs, "pareto": front}


def _state(history: History) -> str:
    code, state = history.exit_code, history.state
    text = state + (f" (exit code {code})" if code else "")
    if history.position and state not in ("finished", "unknown"):
        text += f", in {where(*history.position)}"
    return text


def _run_text(history: History) -> str:
    lines = [f"{history.name}: {printable(_state(history))}"]
    if history.rounds:
        lines += ["", rounds_table([asdict(entry) for entry in history.rounds])]
    else:
        lines.append("no round is finished yet")
    if history.best:
        lines += ["", f"recommended: rounds/{history.best.round:02d} ({printable(history.reason)})"]
    lines += [f"caution: {printable(caution)}" for caution in history.cautions]
    if history.state == "died":
        lines += [
            "",
            "its process was killed or its machine was lost: run the same command to resume",
        ]
    return "\n".join(lines)


def _comparison_text(histories: Sequence[History]) -> str:
    header = ("run", "state", "width", "params", "MACs", "bytes", "base", "acc", "points")
    rows = []
    for name, history in zip(names(histories), histories, strict=True):
        base, best = history.base, history.best
        costs = [f"{getattr(best, cost):,}" if best else "" for cost in COSTS]
        width = f"{best.width:.4f}" if best else ""
        scores = [f"{entry.valid_acc:.4f}" if entry else "" for entry in (base, best)]
        points = _points(history.change)
        rows.append((name, printable(history.state), width, *costs, *scores, points))
    text = table(header, rows, left=2)
    return f"{text}\n\ncaution: {caution}" if (caution := incomparable(histories)) else text


def run_page(histories: Sequence[History], pictures: Sequence[Picture]) -> str:
    """The page of one run: its rounds, figures, configuration."""
    (history,) = histories
    facts = [f"State: {_quote(_state(history))}{_when(history)}."]
    if history.best:
        chosen = f"rounds/{history.best.round:02d}"
        facts.append(f"Recommended: ★ <b>{chosen}</b>, {_quote(history.reason)}.")
    if history.seconds is not None:
        facts.append(f"It has taken {history.seconds:,.0f} seconds so far.")
    parts = [f"<h1>{_quote(history.name)}</h1>", *(f"<p>{fact}</p>" for fact in facts)]
    parts += [_problem(problem) for problem in (*history.cautions, *history.problems)]
    parts.append("<h2>Base and rounds</h2>")
    parts.append(_rounds(history) if history.rounds else "<p>No round is finished yet.</p>")
    parts += _figures(pictures)
    for title, values in history.settings.items():
        rows = [[_quote(key), _quote(value)] for key, value in values.items()]
        parts += [f"<h2>Configuration: {_quote(title)}</h2>", _table(("", ""), rows, left=2)]
    return _page(f"Gammaslim: {history.name}", parts)


def _rounds(history: History) -> str:
    header = (
        "round", "width", *HEADINGS.values(), "channels", "accuracy right after the cut",
        "accuracy after fine-tuning", "best epoch", "difference to the base, points", "seconds",
    )  # fmt: skip
    rows, best = [], set()
    for place, entry in enumerate(history.rounds):
        if entry is history.best:
            best.add(place)
        rows.append([
            "★ recommended: " + entry.name if entry is history.best else entry.name,
            f"{entry.width:.4f}",
            *(_cost(history, entry, cost) for cost in COSTS),
            f"{entry.channels:,}",
            _percent(entry.valid_acc_pruned),
            _percent(entry.valid_acc),
            "" if entry.best_epoch is None else str(entry.best_epoch),
            _points(history.points(entry)) if entry.round else "",
            "" if entry.seconds is None else f"{entry.seconds:,.0f}",
        ])  # fmt: skip
    return _table(header, rows, best)


def comparison_page(histories: Sequence[History], pictures: Sequence[Picture]) -> str:
    """The page of several runs: a row each, and the Pareto figures."""
    header = (
        "", "run", "state", "base's accuracy", "recommended", *HEADINGS.values(), "accuracy",
        "difference to the base, points", "Pareto-optimal in",
    )  # fmt: skip
    rows, optimal = [], fronts(histories)
    for place, (name, history) in enumerate(zip(names(histories), histories, strict=True)):
        base, best = history.base, history.best
        on = [HEADINGS[c] for c in COSTS if best and (place, best.round) in optimal[c]]
        rows.append([
            str(place + 1), _quote(name), _quote(_state(history)),
            _percent(base.valid_acc if base else None),
            f"rounds/{best.round:02d}" if best else "",
            *(_cost(history, best, cost) if best else "" for cost in COSTS),
            _percent(best.valid_acc if best else None),
            _points(history.change), ", ".join(on),
        ])  # fmt: skip
    caution = incomparable(histories)
    parts = [f"<h1>{len(histories)} runs</h1>", *([_problem(caution)] if caution else [])]
    parts += [_problem(problem) for history in histories for problem in history.problems]
    parts += [_table(header, rows, left=3), *_figures(pictures)]
    return _page(f"Gammaslim: {len(histories)} runs", parts)


def _page(title: str, parts: Sequence[str]) -> str:
    return HEAD.format(title=_quote(title)) + "\n".join(parts) + "\n</body>\n</html>\n"


def _points(change: float | None) -> str:
    return "" if change is None else signed(change)


def _quote(value: object) -> str:
    return escape(printable(str(value)))


def _problem(text: str) -> str:
    return f"<p><b>Caution:</b> {_quote(text)}.</p>"


def _when(history: History) -> str:
    try:
        time = datetime.fromtimestamp(history.time, UTC) if history.time else None
    except (OverflowError, ValueError, OSError):  # a year beyond 9999
        time = None
    return f" at {time:%Y-%m-%d %H:%M:%S} UTC" if time else ""


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2%}"


def _cost(history: History, entry: Round, cost: str) -> str:
    share = history.share(entry, cost)
    return f"{getattr(entry, cost):,}" + ("" if share is None else f" ({share:.1%})")


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], best: Collection[int] = (), left: int = 1
) -> str:
    """Rows of HTML, the first ``left`` columns flush left, the ``best`` rows marked."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = [' class="name"' if place < left else "" for place in range(len(cells))]
        return "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, cells, strict=True))

    body = [f"<tr>{line('th', header)}</tr>"] if any(header) else []
    for place, row in enumerate(rows):
        mark = ' class="best"' if place in best else ""
        body.append(f"<tr{mark}>{line('td', row)}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(body) + "\n</table></div>"


def _figures(pictures: Sequence[Picture]) -> list[str]:
    if not pictures:
        return []
    parts = ['<h2>Figures</h2>\n<div class="figures">']
    for picture in pictures:
        source = f"data:image/png;base64,{b64encode(picture.png).decode()}"
        image = f'<img src="{source}" alt="{_quote(picture.text)}">'
        parts.append(f"<figure>{image}<figcaption>{_quote(picture.text)}</figcaption></figure>")
    return [*parts, "</div>"]
