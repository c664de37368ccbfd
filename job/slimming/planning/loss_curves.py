"""Loss curves: the loss of a network's outputs when one channel group alone is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.slimming.importance.scores import Scores

SMALLEST_LOSS = 1e-9  # smaller losses are noise


@dataclass(frozen=True)
class LossCurve:
    """Loss of the outputs by the number of units that a channel group keeps.

    ``counts`` (P,) are the measured numbers of units, rising, and ``losses`` (P,) their losses.
    ``by_count`` (units + 1,) is the interpolated loss for every number of units; it never rises.
    ``images`` is the number of measured images. ``kind`` is the name of the loss: kl (of the
    softmax) or squared_error. A ``removable`` group may keep no unit.
    """

    counts: tuple[int, ...]
    losses: tuple[float, ...]
    by_count: Scores
    images: int = 0
    kind: str = ""
    removable: bool = False

    def with_removal(self, loss: float) -> LossCurve:
        """Return the curve of a removable group, bounded by its measured ``loss`` at 0 units."""
        loss = max(loss, SMALLEST_LOSS)
        by_count = np.minimum(self.by_count, loss)
        by_count[0] = loss
        return replace(self, by_count=by_count, removable=True)


def fit_curve(
    counts: Sequence[int], losses: Sequence[float], units: int, local: Scores | None = None
) -> LossCurve:
    """Return the curve through ``losses`` (P,) at ``counts`` (P,), rising and below ``units``.

    ``local`` (units,) is the error of the next layers with 0, 1, … units kept, if known. Then the
    ratio of the loss to this error is interpolated, else the square root of the loss.
    """
    points = np.array(counts, np.int64)
    measured = np.maximum(np.array(losses), SMALLEST_LOSS)
    numbers = np.arange(units)
    if local is not None:
        shape = np.maximum(np.maximum.accumulate(local[::-1])[::-1], SMALLEST_LOSS)
        ratio = np.log(measured / shape[points])
        values = shape * np.exp(np.interp(numbers, points, ratio))
    else:
        values = np.interp(numbers, [*points, units], [*np.sqrt(measured), 0.0]) ** 2
    by_count = np.append(values, 0.0)
    by_count = np.maximum.accumulate(by_count[::-1])[::-1]
    return LossCurve(tuple(counts), tuple(losses), by_count)
