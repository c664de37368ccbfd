"""Comparison of layer times before and after a cut, and the layers that limit the speed-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from job.slimming.latency.profile import LayerTime, Profile

MAX_BOTTLENECKS = 5
EXPLAINED = 0.8  # share of the excess time that the named layers have together
MIN_SHARE = 0.01  # of the network's time; smaller shares are noise


@dataclass(frozen=True)
class LayerChange:
    """Seconds of one module in a pass before and after a cut, and shares of the network's time.

    ``work`` is the remaining fraction of its multiply-adds, or of its outputs if it has none; None
    if it is unknown.
    """

    layer: str
    kind: str
    before: float
    after: float
    share_before: float
    share_after: float
    work: float | None

    @property
    def excess(self) -> float:
        """Seconds beyond ``before`` times ``work``, the time expected from the work."""
        return 0.0 if self.work is None else self.after - self.before * self.work

    def __str__(self) -> str:
        text = f"{self.layer} ({self.kind}, {self.share_after:.0%} of the time"
        if self.work is None or not self.after or not self.work:
            return text + ")"
        return f"{text}: {self.before / self.after:.2f}x for {1 / self.work:.2f}x less work)"


def compare_profiles(
    before: Profile,
    after: Profile,
    macs_before: Mapping[str, int],
    macs_after: Mapping[str, int],
) -> list[LayerChange]:
    """Return the change of every module of two networks, in the order of the first.

    ``macs_before`` and ``macs_after`` are the multiply-adds of their layers, by name.
    """
    totals = before.seconds or 1.0, after.seconds or 1.0
    changes = []
    for name in dict.fromkeys((*before.layers, *after.layers)):
        one, other = before.layers.get(name), after.layers.get(name)
        each = one or other
        assert each
        times = one.seconds if one else 0.0, other.seconds if other else 0.0
        work = _work(macs_before.get(name), macs_after.get(name), one, other)
        shares = times[0] / totals[0], times[1] / totals[1]
        changes.append(LayerChange(name or "the network", each.kind, *times, *shares, work))
    return changes


def _work(
    macs: int | None, macs_left: int | None, before: LayerTime | None, after: LayerTime | None
) -> float | None:
    """Return the remaining fraction of the work of a layer."""
    if before is None or after is None:
        return None
    if macs and macs_left is not None:
        return macs_left / macs
    return after.elements / before.elements if before.elements else None


def bottlenecks(changes: Sequence[LayerChange]) -> list[LayerChange]:
    """Return the modules whose time fell less than their work, the largest excess first.

    Returns at most ``MAX_BOTTLENECKS`` modules, and no more than are needed to explain the fraction
    ``EXPLAINED`` of the total excess time.
    """
    worst = sorted(
        (c for c in changes if c.excess > 0 and c.share_after >= MIN_SHARE),
        key=lambda change: -change.excess,
    )
    total, explained, chosen = sum(change.excess for change in worst), 0.0, list[LayerChange]()
    for change in worst[:MAX_BOTTLENECKS]:
        if explained >= EXPLAINED * total:
            break
        chosen.append(change)
        explained += change.excess
    return chosen
