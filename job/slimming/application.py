"""``job.apply``: a plan of one network, applied to another of the same architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from job.errors import GammaslimError, UsageError, reason
from job.slimming.analysis import analyse
from job.slimming.arguments import check_network, example_of
from job.slimming.forward_call import forward_pass, own_forward_pass
from job.slimming.inputs import kind_of
from job.slimming.planning.plan import Plan, sizes_of
from job.slimming.surgery.origin import record_origin
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example


def apply(
    model: nn.Module,
    plan: Plan,
    example: Any = None,
    *,
    forward: Callable[..., Any] | None = None,
) -> nn.Module:
    """Return a narrow copy of ``model``, cut by ``plan`` and verified in float64.

    ``model`` has the architecture of the network that ``plan`` was made for, with any weights. Its
    weights are cut and not compensated; load others by ``load_state_dict``. ``example``
    and ``forward`` are as for ``slim``; by default the example is that of the plan, which has one
    if it was made without ``forward``. ``model`` is not changed.

    Raises UsageError if the plan belongs to another architecture or there is no example;
    GammaslimError if verification fails.

    >>> import torch, torchvision
    >>> import job
    >>> wide = torchvision.models.resnet18(num_classes=10)
    >>> narrow, plan = job.slim(wide, torch.rand(1, 3, 64, 64))
    >>> same = job.apply(torchvision.models.resnet18(num_classes=10), plan)
    >>> same.load_state_dict(narrow.state_dict())
    <All keys matched successfully>
    """
    check_network(model)
    if not isinstance(plan, Plan):
        raise UsageError(f"plan must be a Plan, e.g. Plan.load(path); got {kind_of(plan)}")
    if example is None and plan.example is None:
        raise UsageError("the plan has no example: give one, apply(model, plan, example)")
    with forward_pass(model, forward):
        narrow = _verified(
            model, plan, example_of(model, plan.example if example is None else example)
        )
    record_origin(own_forward_pass(narrow), model, plan.layers)
    return narrow


def _verified(model: nn.Module, plan: Plan, inputs: Example) -> nn.Module:
    """Return the narrow copy of ``model``; raises UsageError or GammaslimError."""
    other = f"plan was made for another network than the {type(model).__name__} given"
    graph = analyse(model, inputs, trials=False)
    if why := _mismatch(plan, graph):
        raise UsageError(f"{other}: {why}")
    try:
        narrow = apply_plan(model, plan.layers)
    except (GammaslimError, IndexError, AttributeError, KeyError, RuntimeError) as error:
        raise UsageError(f"{other}: {reason(error)}") from error
    verify(model, narrow, plan.layers, inputs, graph)
    return narrow


def _mismatch(plan: Plan, graph: ChannelGraph) -> str | None:
    """Return why the layers of a network differ from those of the plan; None if they are equal."""
    actual = sizes_of(graph)
    for name, sizes in plan.sizes.items():
        if name not in actual:
            return f"it has no layer {name} that can be cut"
        if actual[name] != sizes:
            return f"{name} has (inputs, outputs) {actual[name]} and not {sizes}"
    return None
