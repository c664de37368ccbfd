"""``job.slim``: one cut of any network, in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.errors import UsageError
from job.slimming.budget import Budget
from job.slimming.calibrated import COMPENSATIONS, IMPORTANCES
from job.slimming.cut import Method, make_cut, plan_cut
from job.slimming.engine import Slimming, analyse
from job.slimming.recalibration import recalibrate as recalibrated

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from job.slimming.moments import Batch
    from job.slimming.plan import Plan

POLICIES = ("uniform", "global")


def slim(
    model: nn.Module,
    example: torch.Tensor,
    *,
    policy: str = "global",
    target: str = "channels=0.5",
    round_to: int = 1,
    min_keep: float = 0.1,
    importance: str = "gamma",
    compensate: str = "none",
    recalibrate: int = 0,
    calibration: Iterable[Batch] | None = None,
    ignore: Iterable[str] = (),
) -> tuple[nn.Module, Plan]:
    """A narrow copy of ``model``, proven in float64, and the plan that it was cut by.

    ``example`` (B, C, H, W) is a batch as the network takes it; only its shape matters.
    ``calibration`` is batches like it, needed by the compensations mean and regress, the
    importances refit and taylor (for which they are pairs with labels (B,)), and ``recalibrate``,
    which takes that many of them. Neither inputs nor outputs of layers named in ``ignore`` are cut.
    ``model`` is left untouched; device, mode and requires_grad are those of its own.

    Raises UsageError for wrong arguments, a network that does not run on ``example``, or a target
    that is out of reach, and GammaslimError when the proof fails.

    >>> import torch, torchvision
    >>> import job
    >>> network = torchvision.models.resnet18(num_classes=10)
    >>> narrow, plan = job.slim(network, torch.rand(1, 3, 64, 64), target="macs=0.5")
    >>> plan.after.macs <= 0.5 * plan.before.macs
    True
    >>> narrow(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """
    if policy not in POLICIES:
        raise UsageError(f"policy {policy!r} is unknown: one of {', '.join(POLICIES)}")
    if not (0 <= min_keep <= 1 and round_to >= 1 and recalibrate >= 0):
        raise UsageError("min_keep is a fraction, round_to at least 1, recalibrate at least 0")
    if importance not in IMPORTANCES or compensate not in COMPENSATIONS:
        raise UsageError(
            f"importance is one of {', '.join(IMPORTANCES)}, compensate of "
            f"{', '.join(COMPENSATIONS)}"
        )
    batches = None if calibration is None else list(calibration)
    if recalibrate and not batches:
        raise UsageError("recalibrate needs calibration batches")
    fresh = None if batches is None else lambda: batches
    graph = analyse(model, example, ignore)
    slimming = Slimming(policy, Budget.parse(target), round_to, min_keep)
    narrow, plan, _ = make_cut(
        model,
        graph,
        example,
        Method(importance, compensate),
        lambda scores: plan_cut(model, graph, scores, slimming, compensate, example),
        fresh,
    )
    if recalibrate and batches:
        recalibrated(narrow, batches[:recalibrate])
    return narrow, plan
