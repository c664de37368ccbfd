"""Trial cuts of suspects: channel groups that the analysis may have misinterpreted.

A view or a slice with fixed sizes is valid for the current number of channels, but perhaps not for
fewer. A cut of the group and its verification show whether it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from job.errors import DataError, UsageError
from job.slimming.graph.callers import line_of_error
from job.slimming.graph.reasons import CODE_COUNT, REARRANGED
from job.slimming.planning.plan import layers_of
from job.slimming.planning.ranked_groups import KeptChannels, rank_groups
from job.slimming.surgery.probe import smallest_equivalent_input
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example


def drop_wrong_suspects(network: nn.Module, graph: ChannelGraph, example: Example) -> ChannelGraph:
    """Return ``graph`` with those suspects blocked whose trial cut fails verification.

    All suspects are cut together first, and halves of them only if that fails. Raises UsageError or
    DataError if no cut of the network can be verified.
    """
    names = list(dict.fromkeys(name for name, *_ in graph.suspects))
    if not names:
        return graph
    if not graph.auxiliary:
        example = smallest_equivalent_input(network, example, graph.forward.treatment)
    failure = _failure(network, graph, names, example)
    if failure is None:
        return graph
    whys = {name: (reason, place) for name, reason, place in graph.suspects}
    wrong = _wrong_suspects(network, graph, names, example, line_of_error(failure))
    for name, line in wrong.items():
        reason, place = whys[name]
        of_code = reason == CODE_COUNT()  # one of all lines that read a size
        graph = graph.without([name], reason, (line or place) if of_code else (place or line))
    unblocked = {group.name for group in graph.groups}
    remaining = [name for name in names if name in unblocked]
    if remaining and _failure(network, graph, remaining, example):
        graph = graph.without(remaining, REARRANGED())
    return graph


def all_suspects_pass(network: nn.Module, graph: ChannelGraph, example: Example) -> bool:
    """Return whether one trial cut of all suspects together is right."""
    names = list(dict.fromkeys(name for name, *_ in graph.suspects))
    if not names:
        return True
    if not graph.auxiliary:
        example = smallest_equivalent_input(network, example, graph.forward.treatment)
    return _failure(network, graph, names, example) is None


def _wrong_suspects(
    network: nn.Module, graph: ChannelGraph, names: list[str], example: Example, line: str
) -> dict[str, str]:
    """Return the groups whose trial cut fails, with the line of the network's code that fails.

    The joint trial cut of ``names`` fails, at ``line``. A line is empty if no code fails.
    """
    if len(names) == 1:
        return {names[0]: line}
    wrong: dict[str, str] = {}
    for half in (names[: len(names) // 2], names[len(names) // 2 :]):
        if failure := _failure(network, graph, half, example):
            wrong |= _wrong_suspects(network, graph, half, example, line_of_error(failure))
    return wrong


def _failure(
    network: nn.Module, graph: ChannelGraph, names: list[str], example: Example
) -> Exception | None:
    """Return the error of a cut of about a third of the channels of the groups ``names``."""
    layers = layers_of(graph, _trial(graph, names))
    try:
        narrow = apply_plan(network, layers)
        verify(network, narrow, layers, example, graph)
    except (UsageError, DataError):
        raise
    except Exception as error:  # user code may raise anything when it gets fewer channels
        return error
    return None


def _trial(graph: ChannelGraph, names: list[str]) -> Ids:
    """Return the mask (count,) of the channels that a trial cut keeps, drawn with a fixed seed."""
    scores = np.random.Generator(np.random.Philox(0)).random(graph.count)
    groups = [r for r in rank_groups(graph, scores) if r.group.name in names]
    counts = [max(1, len(r.units) - max(1, len(r.units) // 3)) for r in groups]
    return KeptChannels(graph, groups)(counts)
