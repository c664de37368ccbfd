"""Find what can be cut of a network: its channel groups, the doubtful ones tried out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.errors import UsageError, reason
from job.slimming.graph.grouping import channel_graph
from job.slimming.inputs import describe_inputs
from job.slimming.surgery.trial_cuts import drop_wrong_suspects

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example


def analyse(network: nn.Module, example: Example, ignore: Iterable[str] = ()) -> ChannelGraph:
    """The channel groups of ``network`` on inputs like ``example``.

    Groups that only seem to be understood are found by trial cuts. Raises UsageError when the
    network does not run on such inputs.
    """
    try:
        graph = channel_graph(network, example, ignore)
    except Exception as error:  # anybody's network, which may raise anything
        raise UsageError(
            f"the network does not run on {describe_inputs(example)}: {reason(error)}"
        ) from error
    return drop_wrong_suspects(network, graph, example)
