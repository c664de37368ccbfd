"""Learning-rate schedules. ``SCHEDULES`` is the table of schedules.

A new schedule is a function here, an entry in the table, and its name in ``ScheduleName`` of
`job.config`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from job.config import PruneConfig, ScheduleName
    from job.training.session import RoundSpec


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule.

    ``factor`` maps the progress, from 0 at the first step towards 1, to the fraction of ``--lr``
    that the step takes.
    """

    factor: Callable[[float], float]
    help: str


def _constant(_progress: float) -> float:
    return 1.0


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _step(progress: float) -> float:
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


SCHEDULES: dict[ScheduleName, Schedule] = {
    "constant": Schedule(_constant, "the same at every step"),
    "cosine": Schedule(_cosine, "falls to 0 along a cosine (Loshchilov & Hutter 2017)"),
    "step": Schedule(_step, "divided by 10 after 1/2 and after 3/4 (Liu et al. 2017)"),
}


def learning_rate(config: PruneConfig, step: int, steps: int) -> float:
    """Return the learning rate at ``step`` of ``steps``, by the schedule of ``config``."""
    return config.lr * SCHEDULES[config.schedule].factor(step / max(1, steps))


def round_learning_rate(config: PruneConfig, spec: RoundSpec, epoch_steps: int, step: int) -> float:
    """Return the learning rate at ``step`` of a round, whose sparse epochs have their own schedule.

    An epoch has ``epoch_steps`` steps.
    """
    dense = spec.epochs * epoch_steps
    if step < dense:
        return learning_rate(config, step, dense)
    return learning_rate(config, step - dense, spec.sparse_epochs * epoch_steps)
