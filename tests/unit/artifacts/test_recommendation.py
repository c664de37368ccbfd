"""Which round of a run is recommended."""

from __future__ import annotations

import pytest

from job.artifacts.recommendation import recommend
from support.records import round_records


def test_recommended_is_the_smallest_near_the_base() -> None:
    assert recommend(round_records(0.9, 0.91, 0.89, 0.8))[0] == 2
    assert recommend(round_records(0.9, 0.91, 0.95))[0] == 2
    chosen, reason = recommend(round_records(0.9, 0.85, 0.8))
    assert chosen == 0
    assert "the base" in reason
    assert recommend(round_records(0.9)) == (0, "the base: no round is finished")


ENTRIES = round_records(0.9, 0.89, 0.87, 0.8)


@pytest.mark.parametrize(
    ("limit", "chosen"), [(0, 0), (0.99, 0), (1, 1), (3, 2), (9.99, 2), (10, 3)]
)
def test_with_max_drop_the_smallest_within_it_is_recommended(limit: float, chosen: int) -> None:
    assert recommend(ENTRIES, limit)[0] == chosen


def test_the_reason_names_the_limit_and_the_drop() -> None:
    assert "within 3 points (--max-drop) of the base" in recommend(ENTRIES, 3)[1]
    assert recommend(ENTRIES, 3)[1].endswith("accuracy -3.00 points")
    assert "more than 0.5 points (--max-drop) below" in recommend(ENTRIES, 0.5)[1]
    assert "within 1 point of the base" in recommend(ENTRIES)[1]
