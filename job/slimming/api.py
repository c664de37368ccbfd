"""``job.slim``: one cut of any network, in Python."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.errors import UsageError
from job.slimming.analysis import analyse
from job.slimming.arguments import (
    budget_of,
    check_choice,
    check_network,
    check_number,
    example_of,
    ignored,
    in_python,
)
from job.slimming.calibrated import COMPENSATIONS, IMPORTANCES
from job.slimming.calibration.batches import batches_of
from job.slimming.compensation.recalibration import recalibrate as recalibrated
from job.slimming.cut import best_method, make_cut, plan_cut
from job.slimming.graph.snapshot import preserve_state
from job.slimming.inputs import strip_values
from job.slimming.planning.allocation import Allocation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example
    from job.slimming.planning.plan import Plan

POLICIES = ("uniform", "global")
LOGGER = logging.getLogger("gammaslim")


def slim(
    model: nn.Module,
    example: Any,
    *,
    policy: str = "global",
    target: str = "channels=0.5",
    round_to: int = 1,
    min_keep: float = 0.1,
    importance: str | None = None,
    compensate: str | None = None,
    recalibrate: int = 0,
    calibration: Iterable[Any] | None = None,
    ignore: Iterable[str | nn.Module] = (),
) -> tuple[nn.Module, Plan]:
    """A narrow copy of ``model``, proven in float64, and the plan that it was cut by.

    ``example`` is a batch as the network takes it: a tensor such as (B, C, H, W), a tuple or list
    of inputs, or a dict of keyword arguments; only sizes and integers matter.

    ``calibration`` is batches like it, or pairs of such and labels (B,): some thousand images are
    used at most. The compensations mean and regress, the importances refit and taylor (which looks
    at labels), and ``recalibrate``, which takes that many batches, need it. ``importance`` and
    ``compensate`` None are the best that there is: refit and regress with ``calibration``, else
    gamma and none; a line, logged by ``gammaslim``, says which.

    Neither inputs nor outputs of layers in ``ignore``, names or modules, are cut. ``model`` is left
    untouched; device, mode and requires_grad are those of its own. ``print(plan)`` shows the cut.

    Raises UsageError for wrong arguments, a network that does not run on ``example``, or a target
    that is out of reach, DataError for damaged weights, and GammaslimError when the proof fails.

    >>> import torch, torchvision
    >>> import job
    >>> network = torchvision.models.resnet18(num_classes=10)
    >>> narrow, plan = job.slim(network, torch.rand(1, 3, 64, 64), target="macs=0.5")
    >>> plan.after.macs <= 0.5 * plan.before.macs
    True
    >>> narrow(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """
    check_network(model)
    check_choice("policy", policy, POLICIES)
    check_choice("importance", importance, IMPORTANCES, none=True)
    check_choice("compensate", compensate, COMPENSATIONS, none=True)
    check_number("round_to", round_to, 1)
    check_number("min_keep", min_keep, 0, 1)
    check_number("recalibrate", recalibrate, 0)
    allocation = Allocation(policy, budget_of(target), int(round_to), float(min_keep))
    inputs, names = example_of(model, example), ignored(model, ignore)
    try:
        graph = _analysed(model, inputs, names)
        batches = (
            None if calibration is None else batches_of(model, inputs, calibration, recalibrate)
        )
        if recalibrate and batches is None:
            raise UsageError("recalibrate needs calibration batches")
        method, line = best_method(importance, compensate, images=batches is not None)
        if line:
            _tell(line)
        with _weights_kept(model, batches is not None):
            narrow, plan, _ = make_cut(
                model,
                graph,
                inputs,
                method,
                lambda scores: plan_cut(
                    model, graph, scores, allocation, method.compensate, inputs
                ),
                None if batches is None else lambda: batches,
            )
    except UsageError as error:
        raise UsageError(in_python(str(error))) from error
    if recalibrate and batches:
        recalibrated(narrow, batches[:recalibrate])
    return narrow, replace(plan, example=strip_values(inputs))


def _analysed(model: nn.Module, inputs: Example, names: list[str]) -> ChannelGraph:
    try:
        return analyse(model, inputs, names)
    except UsageError as error:
        single = isinstance(inputs, torch.Tensor) and inputs.dim() == 3
        hint = "; for a single image give example[None], a batch of one" if single else ""
        raise UsageError(f"example: {error}{hint}") from error


@contextmanager
def _weights_kept(model: nn.Module, measured: bool) -> Iterator[None]:
    """Put chance back and, of a network that runs, weights that its own passes change."""
    with preserve_state(model, values=False) as snapshot:
        if measured:
            snapshot.keep(t for t in snapshot.tensors if isinstance(t, nn.Parameter))
        yield


def _tell(line: str) -> None:
    """Log a line for those who look at logs; else it is seen on stderr, as nobody configured it."""
    if LOGGER.hasHandlers():
        LOGGER.info(line)
    elif LOGGER.level <= logging.INFO:
        print(f"gammaslim: {line}", file=sys.stderr)
