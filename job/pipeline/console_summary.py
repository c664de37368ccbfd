"""Console output at the end of a run: its rounds, the recommended model, and the next commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.artifacts.json_records import to_json
from job.artifacts.run_status import commands_after
from job.artifacts.stored_places import place_of
from job.console import counted, say, say_cautions, say_event
from job.errors import shown
from job.report.latency import latency_cautions
from job.report.tables import rounds_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from job.artifacts.records import RoundRecord, SummaryRecord


def print_summary(
    run: Path, summary: SummaryRecord, entries: Sequence[RoundRecord], *, tested: bool
) -> None:
    """Print the summary of a finished run in the folder ``run``, whose rounds are ``entries``.

    ``tested`` tells whether its data have a test split with targets.
    """
    place = place_of(run)
    say_event({"event": "summary", "path": shown(place), **to_json(summary)})
    say("")
    say(rounds_table(entries), event=True)
    say(f"\nrecommended: {summary.recommended} ({summary.reason})")
    say_cautions([*summary.cautions, *latency_cautions(entries, place)])
    say(f"{counted(summary.seconds, 'second')}; all files are in {shown(place)}")
    for line in commands_after(place, tested=tested):
        say(f"next: {line}")
