"""Optimizers of a user's own training loop, on the narrow network after a cut."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from job.errors import UsageError
from job.slimming.graph.layers import owner_of
from job.slimming.inputs import kind_of
from job.slimming.surgery.origin import origin_of, sources_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from job.slimming.surgery.origin import Origin, ParameterSource

PLAIN_STATE = (int, float, bool, str, type(None))
# set by torch on each optimizer, or by a scheduler that wraps ``step`` of the old one
SET_BY_TORCH = frozenset({"step", "_opt_called", "_compiled_step"})


@dataclass(frozen=True)
class _Member:
    """Parameter of the new optimizer.

    ``old`` is the parameter that it continues, and ``source`` describes how it was cut, if it was.
    Both are None for a parameter that the cut added.
    """

    name: str
    parameter: torch.Tensor
    old: torch.Tensor | None = None
    source: ParameterSource | None = None


def new_optimizer(old: Optimizer, narrow: nn.Module) -> Optimizer:
    """Return an optimizer like ``old`` for the parameters of ``narrow``, with the state that stays.

    ``narrow`` is what ``slim`` or ``apply`` made of the network that ``old`` optimises; call this
    directly after the cut, between two steps. The new optimizer has the class, the groups and the
    hyperparameters of ``old``. Momenta and other state of a parameter's shape are cut as the
    parameter was, single numbers such as step counts are copied. Parameters that the cut adds,
    such as a bias, join the group of other biases or of their layer, without state. Parameters of
    ``old`` that do not belong to the wide network stay as they are. ``old`` is not changed.

    A learning rate scheduler continues after ``scheduler.optimizer = optimizer``; for
    ``SequentialLR`` and ``ChainedScheduler``, also set it in each of ``scheduler._schedulers``.

    Raises UsageError if ``narrow`` is not the result of a cut of this network, or if ``old`` has
    state that cannot be cut, with what to write instead.

    >>> import torch, torchvision
    >>> import job
    >>> wide = torchvision.models.resnet18(num_classes=10)
    >>> old = torch.optim.SGD(wide.parameters(), lr=0.1, momentum=0.9)
    >>> narrow, plan = job.slim(wide, torch.rand(1, 3, 64, 64))
    >>> optimizer = job.new_optimizer(old, narrow)
    >>> len(optimizer.param_groups[0]["params"]) == len(list(narrow.parameters()))
    True
    """
    extras = _extra_attributes(old)
    groups = _members(old, narrow)
    state: dict[torch.Tensor, Any] = {}
    for group, members in zip(old.param_groups, groups, strict=True):
        for member in members:
            if member.old is not None and member.old in old.state:
                state[member.parameter] = _cut_state(old, member)
        state |= _initial_state(old, group, [m.parameter for m in members if m.old is None])
    new: Optimizer = type(old).__new__(type(old))
    new.__setstate__(
        {
            "defaults": dict(old.defaults),
            "state": defaultdict(dict, state),
            "param_groups": list(map(_new_group, old.param_groups, groups)),
        }
    )
    vars(new).update(extras)
    return new


def _members(old: Optimizer, narrow: nn.Module) -> list[list[_Member]]:
    """Return the parameters of each group of the new optimizer; raises UsageError for none."""
    origin = origin_of(narrow)
    wide = {id(parameter) for ref in origin.parameters.values() if (parameter := ref()) is not None}
    old_groups = [group["params"] for group in old.param_groups]
    if not any(id(p) in wide for group in old_groups for p in group):
        raise UsageError(
            "old optimises no parameter of the network that narrow was cut from: after several "
            "cuts, call new_optimizer after each"
        )
    parameters = dict(narrow.named_parameters())
    sources = sources_of(narrow, origin)
    cut_from: dict[int, list[_Member]] = defaultdict(list)
    for name, source in sources.items():
        if source is not None:
            member = _Member(name, parameters[name], source.wide, source)
            cut_from[id(source.wide)].append(member)
    groups = []
    for group in old_groups:
        members = [cut_from[id(p)] if id(p) in wide else [_Member("", p, p)] for p in group]
        groups.append([member for each in members for member in each])
    group_of = _groups_of_wide(old_groups, origin)
    for name, source in sources.items():
        number = _group_to_join(name, group_of, old_groups) if source is None else None
        if number is not None and parameters[name].requires_grad:
            groups[number].append(_Member(name, parameters[name]))
    return groups


def _groups_of_wide(old_groups: list[list[torch.Tensor]], origin: Origin) -> dict[str, int]:
    """Return the number of the group of each wide parameter, by name."""
    number_of = {id(p): number for number, group in enumerate(old_groups) for p in group}
    wide = ((name, id(ref())) for name, ref in origin.parameters.items())
    return {name: number_of[key] for name, key in wide if key in number_of}


def _group_to_join(
    name: str, group_of: Mapping[str, int], old_groups: list[list[torch.Tensor]]
) -> int | None:
    """Return the number of the group that the added bias ``name`` joins; None if not optimised.

    Where vectors are in groups of their own, e.g. without weight decay, it is the first of these.
    """
    owner = owner_of(name)
    if f"{owner}.bias" in group_of:
        return group_of[f"{owner}.bias"]
    number = group_of.get(f"{owner}.weight")
    if number is None or any(p.dim() < 2 for p in old_groups[number]):
        return number
    of_vectors = (n for n, group in enumerate(old_groups) if any(p.dim() < 2 for p in group))
    return next(of_vectors, number)


def _cut_state(old: Optimizer, member: _Member) -> dict[str, object]:
    """Return the state of the parameter of ``member``; raises UsageError if it cannot be cut."""
    assert member.old is not None
    state: dict[str, object] = {}
    for key, value in old.state[member.old].items():
        if isinstance(value, PLAIN_STATE):
            state[key] = value
        elif isinstance(value, torch.Tensor) and value.shape == member.old.shape:
            source = member.source
            state[key] = source.cut(value, member.parameter) if source else value.clone()
        elif isinstance(value, torch.Tensor) and not value.dim():
            state[key] = value.clone()
        else:
            kind = type(old).__name__
            raise UsageError(
                f"{kind} keeps {key!r} of {member.name or 'a parameter'}, {kind_of(value)}, which "
                f"cannot be cut as the parameter of {tuple(member.old.shape)} was: write "
                f"{kind}(narrow.parameters(), …), which starts without state"
            )
    return state


def _initial_state(
    old: Optimizer, group: Mapping[str, Any], added: list[torch.Tensor]
) -> dict[torch.Tensor, Any]:
    """Return the state of ``added`` parameters, for optimizers that create it when built."""
    if not added:
        return {}
    try:
        options = {key: group[key] for key in old.defaults if key in group}
        kind: Any = type(old)
        fresh = kind([{**options, "params": added}])
    except (TypeError, ValueError):  # a class that cannot be built of its groups alone
        return {}
    return dict(fresh.state)


def _new_group(group: Mapping[str, Any], members: list[_Member]) -> dict[str, object]:
    new = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
    }
    new["params"] = [member.parameter for member in members]
    if "param_names" in group:
        names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
        new["param_names"] = [names.get(id(m.old), m.name) for m in members]
    return new


def _extra_attributes(old: Optimizer) -> dict[str, object]:
    """Return the attributes of ``old`` that torch's own optimizers do not have.

    Raises UsageError for something other than an optimizer, or one with attributes of unknown use.
    """
    if not isinstance(old, Optimizer):
        raise UsageError(f"old must be a torch.optim.Optimizer; got {kind_of(old)}")
    kind = type(old).__name__
    plain = vars(torch.optim.SGD([torch.zeros(1)]))
    extras = {k: v for k, v in vars(old).items() if k not in plain and k not in SET_BY_TORCH}
    for name, value in extras.items():
        if isinstance(value, Optimizer):
            raise UsageError(f"old is wrapped in {kind}: pass old.{name}")
        if not isinstance(value, PLAIN_STATE):
            raise UsageError(
                f"{kind} keeps {name!r}, {kind_of(value)}, which may belong to the wide network: "
                f"write {kind}(narrow.parameters(), …), which starts without state"
            )
    return extras
