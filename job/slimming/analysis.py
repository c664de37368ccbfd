"""Analysis: the channel groups of a network, with doubtful ones verified by trial cuts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from job.errors import UsageError, reason
from job.slimming.graph.grouping import channel_graph
from job.slimming.graph.modes import eval_with_hooks
from job.slimming.inputs import call_network, describe_inputs, repeat_first_sample, tensors_in
from job.slimming.surgery.trial_cuts import drop_wrong_suspects, suspects_pass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import AttributeSize
    from job.slimming.inputs import Example

NOT_REPEATED = (
    "; a tensor with a single number is not repeated for the second sample: give an example of two "
    "samples"
)


def analyse(
    network: nn.Module, example: Example, ignore: Iterable[str] = (), *, trials: bool = True
) -> ChannelGraph:
    """Return the channel groups of ``network`` on inputs like ``example``.

    Layers in ``ignore``, given by name, are not cut. Doubtful groups are verified by trial cuts and
    blocked if these fail, unless the caller makes the ``trials`` itself. Raises UsageError if the
    network does not run on such inputs.
    """
    try:
        graph = channel_graph(network, example, ignore)
    except Exception as error:  # user code may raise anything
        one_runs = _runs_on_one_sample(network, example)
        batch = "a batch of two " if one_runs else ""
        shared = one_runs and any(t.dim() and t.numel() == 1 for t in tensors_in(example))
        hint = NOT_REPEATED if shared else ""
        raise UsageError(
            f"the network does not run on {batch}{describe_inputs(example)}: {reason(error)}{hint}"
        ) from error
    return try_suspects(network, graph, example) if trials else graph


def _runs_on_one_sample(network: nn.Module, example: Example) -> bool:
    try:
        with eval_with_hooks(network, ()):
            call_network(network, repeat_first_sample(example, 1))
    except Exception:  # user code may raise anything
        return False
    return True


def readings(graph: ChannelGraph) -> tuple[ChannelGraph, ...]:
    """Return the graphs to try in turn, which read the code of the network in different ways.

    The first has no attributes that count channels, the next has those that ops take, and then
    those that code only compares too. A scale of attention that equals 1/sqrt(D) may be computed
    from the number of channels or, in the last graphs, a constant.
    """
    taken = tuple(size for size in graph.sizes if not size.compared)
    fewer: list[tuple[AttributeSize, ...]] = [()] if graph.sizes else []
    fewer += [taken] if taken and len(taken) < len(graph.sizes) else []
    scaled = (*(replace(graph, sizes=sizes) for sizes in fewer), graph)
    return (*scaled, *(replace(each, scaled=()) for each in scaled if each.scaled))


def try_suspects(network: nn.Module, graph: ChannelGraph, example: Example) -> ChannelGraph:
    """Return ``graph`` with doubtful groups verified by trial cuts, and blocked if these fail."""
    several = readings(graph)
    for each in several if len(several) > 1 else ():  # before separating, which takes many cuts
        if suspects_pass(network, each, example):
            return each
    checked = drop_wrong_suspects(network, graph, example)
    if not graph.sizes:
        return checked
    plain = replace(graph, sizes=())
    without_sizes = replace(checked, sizes=())
    if suspects_pass(network, without_sizes, example):
        return without_sizes
    dropped = {name for name, *_ in graph.suspects} - {name for name, *_ in checked.suspects}
    if suspects_pass(network, plain, example, dropped):  # the sizes are what makes them wrong
        checked_plain = drop_wrong_suspects(network, plain, example)
        if checked_plain.channel_count > checked.channel_count:
            return checked_plain
    return checked
