"""Latency of a round's network on the device of the run, next to the base's."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from job.console import warn
from job.errors import reason
from job.models.input_size import input_shape
from job.slimming.graph.modes import eval_with_hooks, on_device
from job.slimming.latency.alternation import TimeLimits, time_alternately
from job.slimming.latency.clock import clock_of
from job.slimming.latency.profile import random_images
from job.slimming.latency.runtimes import eager
from job.slimming.latency.statistics import Series, Speedup, latency_of, speedup

if TYPE_CHECKING:
    import torch
    from torch import nn

    from job.models.input_size import InputSize
    from job.slimming.latency.clock import Clock

# a tenth of a second shows what a cut gained; on a busy machine more of them do
QUICK = TimeLimits(seconds=0.1, warmup=0.02)
MOST_REPEATS = 10
CERTAIN = 1.1  # ratio of the bounds of a speed-up below which nothing is measured again


def measure_round(
    network: nn.Module, base: nn.Module | None, size: InputSize, device: torch.device
) -> tuple[float | None, Speedup | None]:
    """Return the median latency of ``network`` in seconds, and its speed-up over ``base``.

    Both networks are timed in turn on one random input of ``size``, for longer where other programs
    disturb the measurement; their mode and device are restored. ``base`` is None for the base
    itself, and the speed-up is then None. If a network raises an error, a warning is printed and
    both values are None.
    """
    try:
        return _measure(network, base, size, device, clock_of(device))
    except Exception as error:  # anybody's network, which may raise anything
        warn(f"the latency is not measured, the job continues: {reason(error)}")
        return None, None


def _measure(
    network: nn.Module, base: nn.Module | None, size: InputSize, device: torch.device, clock: Clock
) -> tuple[float, Speedup | None]:
    networks = [network, *([base] if base is not None else [])]
    with ExitStack() as stack:
        for each in networks:
            stack.enter_context(on_device(each, device))
            stack.enter_context(eval_with_hooks(each, []))
        dtype = next(p.dtype for p in network.parameters() if p.is_floating_point())
        images = random_images((1, *input_shape(size)), device, dtype)
        calls = [eager(each, images) for each in networks]
        series = time_alternately(calls, clock, QUICK)
        for _ in range(MOST_REPEATS if base is not None else 0):
            gain = speedup(series[1], series[0])
            if gain.high <= CERTAIN * gain.low:
                break
            more = time_alternately(calls, clock, QUICK)
            series = [Series(a.rounds + b.rounds) for a, b in zip(series, more, strict=True)]
    return latency_of(series[0], 1).median, None if base is None else speedup(series[1], series[0])
