"""Plan a cut: how many channels each group keeps to meet a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from job.errors import UsageError
from job.slimming.graph.groups import BlockedChannels
from job.slimming.graph.layers import LAYER_TYPES, modules_of
from job.slimming.graph.selection import SelectedChannels
from job.slimming.planning.cost import Cost, Costs
from job.slimming.planning.policy import UNRANKED, Planner, Ranked, given_back, ranked, solve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.criteria import Scores
    from job.slimming.planning.plan import Plan
    from job.slimming.planning.target import Budget

WHOLE = 1.0


@dataclass(frozen=True)
class Slimming:
    """How to cut: a ``policy`` to a ``budget``, with floors of ``min_keep`` of a group.

    The kept count of each group is a multiple of ``round_to`` where it is large enough.
    """

    policy: str
    budget: Budget
    round_to: int = 1
    min_keep: float = 0.1


@dataclass(frozen=True)
class Base:
    """What a network was before any cut: fractions are of this.

    ``widths``: channels that each layer writes. ``cost``: None, when they are those of now.
    ``slim``: it was cut itself, so that the network's own width 1 is not what fractions are of.
    """

    widths: Mapping[str, int]
    cost: Cost | None = None
    slim: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As stored in model.json."""
        values = {"widths": dict(self.widths), "cost": self.cost.to_dict() if self.cost else None}
        return values | ({"slim": True} if self.slim else {})

    @classmethod
    def from_dict(cls, values: Any) -> Base:
        """Read back what ``to_dict`` gave; raises KeyError, TypeError or ValueError."""
        widths = {str(name): int(width) for name, width in values["widths"].items()}
        cost = values["cost"]
        whole = cost and Cost(**{name: int(n) for name, n in cost.items()})
        return cls(widths, whole, bool(values.get("slim", False)))


def layer_widths(network: nn.Module) -> dict[str, int]:
    """How many channels each convolution, linear layer and BatchNorm writes."""
    widths = {}
    for name, layer in modules_of(network, once=True).items():
        if isinstance(layer, SelectedChannels):
            widths[name] = len(layer.indices)
        elif isinstance(layer, LAYER_TYPES):
            names = ("out_channels", "out_features", "num_features")
            widths[name] = int(next(getattr(layer, n) for n in names if hasattr(layer, n)))
    return widths


def full_sizes(network: nn.Module, graph: ChannelGraph, base: Base | None) -> dict[str, int]:
    """How many channels each group had in the base, or has at the network's own width 1."""
    now, sizes = layer_widths(network), {}
    own = {} if base and base.slim else getattr(network, "uniform_widths", {})
    widths = {**(base.widths if base else now), **own}
    for group in graph.groups:
        layer = next((layer for layer in group.layers if layer in widths), None)
        full = widths[layer] / now[layer] if layer in now and layer else WHOLE
        sizes[group.name] = round(group.size * full)
    return sizes


def make_plan(
    network: nn.Module,
    graph: ChannelGraph,
    scores: Scores,
    slimming: Slimming,
    base: Base | None = None,
    unbiased: frozenset[str] = frozenset(),
) -> Plan:
    """Which channels stay, by ``scores`` (channels,); raises UsageError for what cannot be reached.

    ``base`` is what fractions are of; by default the network itself. ``unbiased`` layers get a bias
    when they are to read fewer channels, which the costs take into account.
    """
    sizes = full_sizes(network, graph, base)
    groups = ranked(graph, scores, least=_floors(slimming, sizes), round_to=slimming.round_to)
    graph, uniform = _explained(graph, groups), slimming.policy == "uniform"
    own: Mapping[str, int] | None = getattr(network, "uniform_widths", None) if uniform else None
    if own is not None:  # only those that the network's own width scales
        groups = [r for r in groups if r.group.name in own]
    costs = Costs(network, graph, unbiased)
    planner = Planner(graph, costs, groups, base.cost if base else None)
    slimming.budget.fraction(planner.whole)  # refuses more than there is
    if uniform:
        return _uniform(planner, slimming.budget, planner.whole, sizes, strict=own is not None)
    return _global(planner, slimming.budget, planner.whole)


def _floors(slimming: Slimming, sizes: Mapping[str, int]) -> dict[str, int]:
    if slimming.policy == "uniform":
        return dict.fromkeys(sizes, 1)
    return {name: max(1, _ceil(slimming.min_keep * size)) for name, size in sizes.items()}


def _ceil(value: float) -> int:
    return -int(-(value - 1e-9) // 1)


def _explained(graph: ChannelGraph, groups: Sequence[Ranked]) -> ChannelGraph:
    """The graph whose ``blocked`` tells of groups without a rank too."""
    names = {r.group.name for r in groups}
    extra = tuple(
        BlockedChannels(layer, group.size, UNRANKED)
        for group in graph.groups
        if group.name not in names
        for layer in group.layers
    )
    return replace(graph, blocked=graph.blocked + extra)


def _global(planner: Planner, budget: Budget, base: Cost) -> Plan:
    """One threshold over all groups (Liu et al. 2017), solved so that the budget is met."""
    if budget.metric == "width":
        budget = replace(budget, metric="channels")
    limit, counts_at = budget.limit(base), planner.in_order()
    units = sum(len(r.units) for r in planner.groups)
    first = solve(planner, budget, limit, range(units, -1, -1), counts_at)
    counts = given_back(planner, counts_at(first), budget, limit)
    plan = planner.plan("global", counts, WHOLE)
    return replace(plan, width=_share(plan, base))


def _share(plan: Plan, base: Cost) -> float:
    """Width of a network whose groups differ: its channels relative to the base's."""
    return plan.after.channels / base.channels if plan.after and base.channels else WHOLE


def _uniform(
    planner: Planner, budget: Budget, base: Cost, sizes: Mapping[str, int], *, strict: bool
) -> Plan:
    """The same fraction of every group."""
    if budget.metric == "width":
        _check_width(planner, budget, sizes, strict=strict)
        counts = planner.counts_at(sizes, budget.value)
        return planner.plan("uniform", counts, budget.value)
    fractions = {
        count / sizes[r.group.name] for r in planner.groups for count in range(1, r.group.size + 1)
    }
    steps = sorted(fractions, reverse=True)

    def counts_at(width: float) -> list[int]:
        return planner.counts_at(sizes, width)

    width = solve(planner, budget, budget.limit(base), steps, counts_at)
    return planner.plan("uniform", counts_at(width), width)


def _check_width(
    planner: Planner, budget: Budget, sizes: Mapping[str, int], *, strict: bool
) -> None:
    """Raise UsageError where a group would have to grow, or (``strict``) be left empty."""
    width = budget.value
    for r in planner.groups:
        full, now = sizes[r.group.name], r.group.size
        if int(full * width + 1e-9) > now:
            widest = max(g.group.size / sizes[g.group.name] for g in planner.groups)
            raise UsageError(
                f"{budget}: width {width:g} is not below the network's own, about {widest:.4g}"
            )
        if strict and int(full * width + 1e-9) < 1:
            least = 1 / min(sizes[g.group.name] for g in planner.groups)
            raise UsageError(
                f"{budget}: width {width:g} leaves no channel of {r.group.name}: the least is "
                f"{least:g}"
            )
