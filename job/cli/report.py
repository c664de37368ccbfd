"""``report``: show one run, or compare several."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.object_store import is_store_url
from job.artifacts.run_reader import find_runs, read_run
from job.artifacts.stored_copy import local_path
from job.console import print_result, say, warn
from job.errors import shown
from job.files import check_output, check_writable, write_output
from job.report.comparison import comparison_csv, comparison_json
from job.report.comparison_page import comparison_page
from job.report.figures import comparison_charts, run_charts
from job.report.page import write_comparison, write_figures
from job.report.run_page import run_page
from job.report.tables import comparison_table, run_overview

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.history import History


def report(
    paths: Sequence[str], output: str | None, as_json: bool, table: str | None = None
) -> None:
    """Print a table of one run or several, and write the HTML page of the report.

    The page of one local run is written to its folder, otherwise to the current folder. ``output``
    is another file for the page; the figures are written next to it. ``table`` is a CSV
    file to write as well, or "-". Raises InputNotFound, OutputError, StorageError, or
    GammaslimError without matplotlib.
    """
    histories = _read_runs(paths)
    alone = histories[0] if len(histories) == 1 else None
    stored = any(map(is_store_url, paths))  # a copy of it is read
    target = Path(output or (alone.path / "report.html" if alone and not stored else "report.html"))
    path = check_output(target)
    own = alone and not output and not stored
    folder = path.with_name("figures" if own else f"{path.stem}_figures")
    keeps_figures = not path.exists() or path.is_file()  # not next to a pipe or a device
    if keeps_figures:
        check_writable(folder)
    charts = run_charts(alone) if alone else comparison_charts(histories)
    if keeps_figures:
        write_figures(folder, charts)
        if not alone:
            write_comparison(folder, charts)
    write_output(path, run_page(alone, charts) if alone else comparison_page(histories, charts))
    for history in histories:
        for problem in history.problems:
            warn(problem)
    if table and table != "-":
        write_output(check_output(Path(table)), comparison_csv(histories).encode())
    if table == "-":
        print_result(comparison_csv(histories).removesuffix("\n"))
    elif as_json:
        print_result(json.dumps(comparison_json(histories) | {"report": shown(target)}, indent=1))
    else:
        say(run_overview(alone) if alone else comparison_table(histories))
        say(f"\nreport: {shown(target)}")


def _read_runs(paths: Sequence[str]) -> list[History]:
    """Read the runs in ``paths`` and in the folders under them, without duplicates."""
    unique: dict[str, Path] = {}
    for path in paths:
        for run in find_runs(Path(local_path(path, weights=False))):
            unique.setdefault(os.path.realpath(run), run)
    return [read_run(path) for path in unique.values()]
