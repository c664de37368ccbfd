"""Cuts to a latency, planned by measured layer times and checked on the whole network.

The latency of a network is not the sum of its layers' times. After each plan the narrow network is
built and timed in turn with the base, and the budget of the next plan is corrected accordingly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from job.errors import UsageError
from job.slimming.calibration.progress import no_progress
from job.slimming.graph.modes import eval_with_hooks, on_device
from job.slimming.inputs import call_network, map_tensors, repeat_first_sample
from job.slimming.latency.alternation import TimeLimits, time_alternately
from job.slimming.latency.clock import clock_of
from job.slimming.latency.network_latency import measure_network
from job.slimming.latency.profile import random_images
from job.slimming.latency.statistics import latency_of, speedup
from job.slimming.planning.measurements import PlannedLatency
from job.slimming.planning.search import OutOfReachError
from job.slimming.planning.target import Budget
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example
    from job.slimming.latency.clock import Clock
    from job.slimming.latency.network_latency import NetworkLatency
    from job.slimming.planning.allocation import Allocation
    from job.slimming.planning.plan import Plan

    PlanWith = Callable[[Allocation, NetworkLatency], Plan]

LATENCY_TOLERANCE = 1.03  # largest factor between a latency and the target that it meets
MAX_ATTEMPTS = 8
LIMITS = TimeLimits(seconds=1.0, burst=0.1)  # per network; the shortest call of a burst counts


def meet_latency(
    network: nn.Module,
    graph: ChannelGraph,
    example: Example,
    allocation: Allocation,
    plan_with: PlanWith,
    base: nn.Module | None = None,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> Plan:
    """Return the plan whose network meets the latency budget of ``allocation`` within 3 %.

    ``plan_with`` makes the plan of an allocation from predicted latencies. Fractions are relative
    to ``base``, by default ``network``. All networks run on the device of ``network``, where
    ``base`` is moved for the time being, on inputs like ``example``. Raises UsageError, with the
    lowest latency, if no cut meets the budget.
    """
    weight = next(network.parameters())
    clock = clock or clock_of(weight.device)
    inputs = timing_inputs(example, allocation.latency_batch, weight)
    base = base or network
    with on_device(base, weight.device), eval_with_hooks(network, []), eval_with_hooks(base, []):
        timer = _Timer(network, base, inputs, clock)
        latency = measure_network(network, graph, inputs, clock, progress)

        def plan_at(fraction: float) -> Plan:
            seconds = Budget("latency", fraction * latency.whole, str(allocation.budget))
            return plan_with(replace(allocation, budget=seconds), latency)

        return _search(plan_at, timer, allocation, latency.whole, progress)


def timing_inputs(example: Example, batch: int, weight: torch.Tensor) -> Any:
    """Return random inputs like ``example`` for ``batch`` samples, on the device of ``weight``."""

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.to(weight.device)
        return random_images(tensor.shape, weight.device, weight.dtype)

    return map_tensors(repeat_first_sample(example, batch), filled)


@dataclass(frozen=True)
class _Trial:
    """Plan for the fraction ``aim`` of the predicted time, and its measured ``fraction``."""

    aim: float
    plan: Plan | None  # None for the network as it is
    fraction: float  # of the base's measured time


class _Timer:
    """Times networks in turn with the base."""

    def __init__(self, network: nn.Module, base: nn.Module, inputs: Example, clock: Clock) -> None:
        self.network, self.base, self.inputs, self.clock = network, base, inputs, clock
        self.seconds = 0.0  # measured time of the base
        fraction = self.fraction_of(network)
        self.uncut_fraction = 1.0 if base is network else fraction

    def fraction_of(self, network: nn.Module) -> float:
        """Return the time of ``network`` as a fraction of the base's."""
        calls = [lambda: call_network(self.base, self.inputs),
                 lambda: call_network(network, self.inputs)]  # fmt: skip
        base, other = time_alternately(calls, self.clock, LIMITS)
        self.seconds = latency_of(base, 1).median
        return 1 / speedup(base, other).value

    def trial(self, aim: float, plan: Plan, target: float) -> _Trial:
        """Build the narrow network of ``plan``, and time it."""
        narrow = apply_plan(self.network, plan.layers).eval()
        fraction = self.fraction_of(narrow)
        if 1 / LATENCY_TOLERANCE <= fraction / target <= LATENCY_TOLERANCE:
            # timed again: by chance alone, one of several plans seems to meet the target
            fraction = math.sqrt(fraction * self.fraction_of(narrow))
        times = PlannedLatency(self.seconds, fraction * self.seconds, fraction)
        return _Trial(aim, replace(plan, latency=times), fraction)


def _search(
    plan_at: Callable[[float], Plan],
    timer: _Timer,
    allocation: Allocation,
    whole: float,
    progress: Progress,
) -> Plan:
    """Return the plan nearest to the target; ``plan_at`` takes a fraction of the predicted time."""
    budget = allocation.budget
    target = budget.value / timer.seconds if budget.absolute else budget.value
    target = min(target, 1.0) ** allocation.share
    least, trials = 0.0, [_Trial(1.0, None, timer.uncut_fraction)]
    for attempt in range(1, MAX_ATTEMPTS + 1):
        progress("timing the network", attempt, MAX_ATTEMPTS)
        aim = max(_next_aim(trials, target), least)
        try:
            plan = plan_at(aim)
        except OutOfReachError as error:
            least = aim = error.least / whole * (1 + 1e-9)
            plan = plan_at(aim)
        trial = timer.trial(aim, plan, target)
        trials.append(trial)
        fits = trial.fraction <= target * LATENCY_TOLERANCE
        if (fits and trial.fraction >= target / LATENCY_TOLERANCE) or (aim == least and not fits):
            break
    fitting = [t for t in trials[1:] if t.fraction <= target * LATENCY_TOLERANCE]
    if not fitting:
        raise UsageError(_unreachable(budget, min(trials[1:], key=lambda t: t.fraction)))
    best = max(fitting, key=lambda trial: trial.fraction).plan
    assert best
    return best


def _next_aim(trials: list[_Trial], target: float) -> float:
    """Return the fraction of the predicted time to plan next, between the nearest trials."""
    slower = min((t for t in trials if t.fraction > target), key=lambda t: t.aim, default=trials[0])
    faster = [t for t in trials if t.fraction <= target and t.aim < slower.aim]
    if not faster:
        return min(1.0, slower.aim * target / slower.fraction)
    below = max(faster, key=lambda t: t.aim)
    ratio = math.log(slower.fraction / below.fraction)
    part = math.log(target / below.fraction) / ratio if ratio > 0 else 0.5
    return float(below.aim * (slower.aim / below.aim) ** min(max(part, 0.1), 0.9))


def _unreachable(budget: Budget, best: _Trial) -> str:
    assert best.plan
    assert best.plan.latency
    return (
        f"{budget} cannot be reached here: the minimum is latency={best.fraction:.3g} of the base, "
        f"{1000 * best.plan.latency.after:.3g} ms; lower --min-keep or --round-to to go further"
    )
