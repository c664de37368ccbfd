"""Costs of a narrow network, each as a share of the wide network's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from job.slimming.latency.alternation import TimeLimits, time_alternately
from job.slimming.latency.clock import clock_of
from job.slimming.latency.statistics import speedup
from job.slimming.planning.cost import network_cost

BRIEF = TimeLimits(seconds=0.5, burst=0.05)
LONG = TimeLimits(seconds=3.0, burst=0.1)
Share = Callable[[nn.Module], float]


def macs_share(wide: nn.Module, size: int) -> Share:
    """Return a function of the share of the multiply-adds of an image of ``size`` pixels."""
    whole = network_cost(wide, size).macs
    return lambda narrow: network_cost(narrow, size).macs / whole


def latency_share(wide: nn.Module, image: torch.Tensor, limits: TimeLimits = BRIEF) -> Share:
    """Return a function that times both networks in turn on ``image`` (1, C, H, W)."""
    clock = clock_of(image.device)

    @torch.inference_mode()
    def share(narrow: nn.Module) -> float:
        calls = [partial(network, image) for network in (wide.eval(), narrow.eval())]
        return 1 / speedup(*time_alternately(calls, clock, limits)).value

    return share
