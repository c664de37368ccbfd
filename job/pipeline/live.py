"""Facts about a run in progress, for the second line of the live view on a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from job.console import span

if TYPE_CHECKING:
    from job.pipeline.session import Session


def live_facts(session: Session) -> str:
    """Return step, speed, time left in the round, accuracy so far and age of the last save."""
    state, base = session.state, session.entries[0] if session.entries else None
    left = state.forecast.round_left()
    parts = [f"step {session.place.step:,}"]
    if state.speed:
        parts.append(f"{state.speed:,.0f} images/s")
    if left is not None and state.forecast.rounds is not None:
        parts.append(f"round: {span(left)} left")
    if state.best_acc is not None:
        parts.append(f"best {session.setup.metric} {state.best_acc:.4f}")
    if base and state.round and state.round.index:
        parts.append(f"base {base.valid_acc:.4f}")
    if state.saved_at is not None:
        parts.append(f"saved {span(time.monotonic() - state.saved_at)} ago")
    return "  ".join(parts)
