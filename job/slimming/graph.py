"""Channel groups: which positions of which layers must be cut together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from job.errors import UsageError
from job.models.student import MULTIPLIERS, SCALED, StudentNet

if TYPE_CHECKING:
    from torch import nn

Side = Literal["out", "in", "through"]


@dataclass(frozen=True)
class Position:
    """Where a group's channels stand in ``layer``.

    ``out``: rows that a convolution writes; ``in``: columns that a reader sums over; ``through``:
    channels that pass one by one (BatchNorm, depthwise convolution).
    """

    layer: str
    side: Side


@dataclass(frozen=True)
class ChannelGroup:
    """Channels cut together: ``size`` now, ``nominal`` at width 1, ranked by ``norms``."""

    name: str
    size: int
    nominal: int
    norms: tuple[str, ...]
    positions: tuple[Position, ...]


@dataclass(frozen=True)
class Blocked:
    """Output channels of ``layer`` that are not cut, and why."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class ChannelGraph:
    """All groups of a network, in the order of the data flow, and what cannot be cut."""

    groups: tuple[ChannelGroup, ...]
    blocked: tuple[Blocked, ...]


def channel_graph(network: nn.Module) -> ChannelGraph:
    """The channel groups of ``network``; raises UsageError for a network it does not know."""
    if isinstance(network, StudentNet):
        return _student_graph(network)
    raise UsageError(f"{type(network).__name__} cannot be slimmed: only StudentNet can")


def _student_graph(network: StudentNet) -> ChannelGraph:
    """The homework's rule: what blocks 3 to 6 write and the next block reads.

    The reading block's depthwise convolution, its BatchNorm and its pointwise inputs are cut
    together with the writing pointwise's outputs.
    """
    groups, blocked = [], []
    fixed = "the homework keeps the first blocks at full width"
    for block, multiplier in enumerate(MULTIPLIERS):
        writer = f"cnn.{block}.3" if block else "cnn.0.0"
        written = cast("nn.Conv2d", network.get_submodule(writer)).out_channels
        reader = f"cnn.{block + 1}"
        if block in SCALED:
            positions = (
                Position(writer, "out"),
                Position(f"{reader}.0", "through"),
                Position(f"{reader}.1", "through"),
                Position(f"{reader}.3", "in"),
            )
            nominal = network.base * multiplier
            groups.append(ChannelGroup(reader, written, nominal, (f"{reader}.1",), positions))
        else:
            last = block == len(MULTIPLIERS) - 1
            reason = "no BatchNorm ranks what the classifier reads" if last else fixed
            blocked.append(Blocked(writer, written, reason))
    return ChannelGraph(tuple(groups), tuple(blocked))
