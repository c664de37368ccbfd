"""Trial cuts of suspects: channel groups that the analysis may have misinterpreted.

A view or a slice with fixed sizes is valid for the current number of channels, but perhaps not for
fewer. A cut of the group and its verification show whether it is.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from job.errors import DataError, UsageError, is_out_of_memory
from job.slimming.graph.callers import line_of_error
from job.slimming.graph.reasons import CODE_COUNT, REARRANGED
from job.slimming.planning.plan import keep_of, layers_of
from job.slimming.planning.ranked_groups import KeptChannels, rank_groups
from job.slimming.surgery.probe import smallest_equivalent_input
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import check_it_runs, verify

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example
    from job.slimming.planning.layer_channels import Kept


def drop_wrong_suspects(network: nn.Module, graph: ChannelGraph, example: Example) -> ChannelGraph:
    """Return ``graph`` with those suspects blocked whose trial cut fails verification.

    All suspects are cut together first, and fewer of them only if that fails. Raises UsageError or
    DataError if no cut of the network can be verified.
    """
    names = list(dict.fromkeys(name for name, *_ in graph.suspects))
    trials = _Trials(network, graph, example)
    if not names or (failure := trials.failure(names)) is None:
        return graph
    whys = {name: (reason, place) for name, reason, place in graph.suspects}
    wrong = trials.wrong_by_line(names, failure)
    for name, line in wrong.items():
        reason, place = whys[name]
        of_code = reason == CODE_COUNT()  # one of all lines that read a size
        graph = graph.without([name], reason, (line or place) if of_code else (place or line))
    unblocked = {group.name for group in graph.groups}
    remaining = [name for name in names if name in unblocked]
    trials.graph = graph
    if remaining and trials.failure(remaining):
        graph = graph.without(remaining, REARRANGED())
    return graph


def without_wrong_groups(
    network: nn.Module,
    graph: ChannelGraph,
    example: Example,
    kept: Mapping[str, Kept],
    failure: Exception,
) -> ChannelGraph:
    """Return ``graph`` with those groups blocked that make a cut wrong; it may be ``graph`` itself.

    The cut keeps the indices ``kept`` of each group, by name, and ends in ``failure``. Fewer groups
    lose the same channels in its trial cuts.
    """
    names = [group.name for group in graph.groups if len(kept[group.name]) < group.size]
    trials = _Trials(network, graph, example, kept)
    if trials.failure(names, quick=True) is None:
        trials.example = example  # it fails on images of the full size alone
    for name, line in trials.wrong_by_line(names, failure).items():
        graph = graph.without([name], CODE_COUNT(), line)
    return graph


def suspects_pass(
    network: nn.Module, graph: ChannelGraph, example: Example, names: Collection[str] | None = None
) -> bool:
    """Return whether one trial cut of all suspects, or of those in ``names``, is right."""
    suspects = list({name for name, *_ in graph.suspects if names is None or name in names})
    return not suspects or _Trials(network, graph, example).failure(suspects, quick=True) is None


class _Trials:
    """Trial cuts of a network, on images as small as they may be.

    They keep the indices ``kept`` of each group, by name, by default about two thirds of them.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: ChannelGraph,
        example: Example,
        kept: Mapping[str, Kept] | None = None,
    ) -> None:
        self.network, self.graph, self.example, self.kept = network, graph, example, kept
        if graph.suspects or kept:
            self.example = smallest_equivalent_input(network, example, graph)

    def wrong_by_line(self, names: list[str], failure: Exception) -> dict[str, str]:
        """Return the groups whose trial cut fails, with the line of the network's code that fails.

        The joint trial cut of ``names`` ends in ``failure``. The groups that the failing line of
        code rearranges are set aside until the others pass. A line is empty if no code fails.
        """
        left = names
        aside: list[list[str]] = []
        failing: Exception | None = failure
        while failing is not None:
            line = line_of_error(failing)
            near = {name for name, _, place in self.graph.suspects if place == line}
            chosen = [name for name in left if name in near]
            if not chosen:
                break
            aside.append(chosen)
            left = [name for name in left if name not in near]
            failing = self.failure(left, quick=True) if left else None
        wrong = self._wrong(left, line_of_error(failing)) if failing is not None else {}
        for chosen in aside:
            if failing := self.failure(chosen, quick=True):
                wrong |= self._wrong(chosen, line_of_error(failing))
        return wrong

    def _wrong(self, names: list[str], line: str) -> dict[str, str]:
        """Separate the wrong groups by halves; the joint trial cut of ``names`` fails."""
        if len(names) == 1:
            return {names[0]: line}
        wrong: dict[str, str] = {}
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            if failing := self.failure(half, quick=True):
                wrong |= self._wrong(half, line_of_error(failing))
        return wrong

    def failure(self, names: list[str], quick: bool = False) -> Exception | None:
        """Return the error of a cut of the groups ``names`` alone.

        With ``quick``, the narrow network runs by itself first. Raises UsageError or DataError
        otherwise if no cut can be verified.
        """
        if self.kept:
            keep = keep_of(self.graph, {name: self.kept[name] for name in names})
        else:
            keep = _trial(self.graph, names)
        layers = layers_of(self.graph, keep)
        with catching_wrong_cut() as errors:
            narrow = apply_plan(self.network, layers)
            if quick:
                check_it_runs(narrow, self.example, self.graph.auxiliary)
            verify(self.network, narrow, layers, self.example, self.graph)
        return errors[0] if errors else None


@contextmanager
def catching_wrong_cut() -> Iterator[list[Exception]]:
    """Catch the error of a cut that is wrong or does not run, into the list that is yielded.

    Other errors are raised: UsageError and DataError, if no cut can be verified, and those of
    memory.
    """
    errors: list[Exception] = []
    try:
        yield errors
    except (UsageError, DataError):
        raise
    except Exception as error:  # user code may raise anything when it gets fewer channels
        if is_out_of_memory(error):
            raise
        errors.append(error)


def _trial(graph: ChannelGraph, names: list[str]) -> Ids:
    """Return the mask (count,) of the channels that a trial cut keeps, drawn with a fixed seed."""
    scores = np.random.Generator(np.random.Philox(0)).random(graph.count)
    groups = [r for r in rank_groups(graph, scores) if r.group.name in names]
    counts = [max(1, len(r.units) - max(1, len(r.units) // 3)) for r in groups]
    return KeptChannels(graph, groups)(counts)
