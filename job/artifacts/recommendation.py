"""Recommendation of a round of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.artifacts.accuracy import accuracy_change, score_name, signed_points
from job.config import MAX_DROP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.records import RoundRecord


def points_lost(entries: Sequence[RoundRecord], entry: RoundRecord) -> float:
    """Return the drop of accuracy from the base, first of ``entries``, in percentage points."""
    return 0.0 - accuracy_change(entry.valid_acc, entries[0].valid_acc)


def recommend(entries: Sequence[RoundRecord], max_drop: float | None = None) -> tuple[int, str]:
    """Return the recommended round and the reason for it.

    The recommended round is the smallest one whose validation accuracy is at most ``max_drop``
    (by default MAX_DROP) percentage points below the accuracy of the base.
    """
    limit = MAX_DROP if max_drop is None else max_drop
    points = f"{limit:g} point" + ("" if limit == 1 else "s")
    points += "" if max_drop is None else " (--max-drop)"
    base = entries[0]
    near = [entry for entry in entries if points_lost(entries, entry) <= limit]
    chosen = min(near, key=lambda entry: (entry.params, entry.round))
    if chosen.round == 0:
        if len(entries) == 1:
            return 0, "the base: no round is finished"
        return 0, f"the base: every round falls more than {points} below it"
    gain = signed_points(accuracy_change(chosen.valid_acc, base.valid_acc))
    return chosen.round, (
        f"the fewest parameters within {points} of the base: "
        f"{chosen.params / base.params:.1%} of them, {score_name(base.metric)} {gain} points"
    )
