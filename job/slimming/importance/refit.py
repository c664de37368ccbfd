"""Importance by what is lost for good: how far the readers' outputs move when a channel goes.

The weights of those that stay are fitted anew by least squares: the optimal brain surgeon (Hassibi
& Stork 1993) on channels instead of weights. The loss of removing channel j of a reader of weights
W and input covariance C is |W_j|² / [C⁻¹]_jj, after which W and C⁻¹ are those of the rest. Taken
greedily, the cheapest channel first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from job.slimming.calibration.moments import RIDGE, readers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from job.slimming.calibration.moments import Moments, Reader
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.importance.scores import Scores

Matrix = np.ndarray[Any, np.dtype[np.float64]]
STEPS = 256  # of a group: larger ones lose several channels in each
CHOICE = 4  # times as many are looked at closely


def refit_importance(
    network: nn.Module,
    graph: ChannelGraph,
    moments: Mapping[str, Moments],
    *,
    ridge: float = RIDGE,
) -> Scores:
    """What all removals of a group up to this channel's cost, by channel number.

    The unit is the variance of a reader's outputs, over all readers of the channel; those of other
    groups stay. nan where no reader with ``moments`` is known.
    """
    parts: list[list[_Part]] = [[] for _ in graph.groups]
    unknown = np.zeros(graph.count, bool)
    for position in graph.slots:
        unknown[position.ids] |= position.side == "in"
    for reader in readers(network, graph):
        if reader.layer in moments:
            unknown[reader.channels] = False
            _share(graph, reader, _parts(network, reader, moments[reader.layer], ridge), parts)
    scores = np.full(graph.count, np.nan)
    for group, found in zip(graph.groups, parts, strict=True):
        scores[group.channels] = _eliminated(found, group.size)
    scores[unknown] = np.nan
    return scores


@dataclass
class _Part:
    """What one reader, or one group of a grouped convolution, makes of some channels.

    ``members`` (n,) says which they are, ``inverse`` (n, n) is their part of C⁻¹, ``gram`` (n, n)
    the products of their weights over the variance of the reader's outputs.
    """

    members: Ids
    inverse: Matrix
    gram: Matrix

    def taken(self, at: Ids, members: Ids) -> _Part:
        """Only those ``at`` (n,), under other names."""
        square = np.ix_(at, at)
        return _Part(members, self.inverse[square], self.gram[square])

    def losses(self, size: int) -> Scores:
        """The loss (size,) of removing each channel alone; 0 for those that are not here."""
        found = np.zeros(size)
        often = np.bincount(self.members, minlength=size)
        if often.max(initial=0) <= 1:
            found[self.members] = self.gram.diagonal() / self.inverse.diagonal()
            return found.clip(0)
        order = np.argsort(self.members, kind="stable")
        for times in np.unique(often[often > 0]):  # it goes from all places where it is read
            at = order[often[self.members[order]] == times].reshape(-1, times)
            square = at[:, :, None], at[:, None, :]
            solved = np.linalg.solve(self.inverse[square], self.gram[square])
            found[self.members[at[:, 0]]] = np.trace(solved, axis1=1, axis2=2)
        return found.clip(0)

    def remove(self, gone: Ids) -> None:
        """Fit the weights of the others anew without the channels ``gone`` (size,) bool."""
        away = gone[self.members]
        if not away.any():
            return
        inverse, gram = self.inverse, self.gram
        # of each removed weight, what each other one takes
        share = np.linalg.solve(inverse[np.ix_(away, away)], inverse[away]).T
        mixed = share @ gram[away]
        gram -= mixed + mixed.T - share @ gram[np.ix_(away, away)] @ share.T
        inverse -= share @ inverse[away]
        stay = np.flatnonzero(~away)
        square = np.ix_(stay, stay)
        self.members, self.inverse, self.gram = self.members[stay], inverse[square], gram[square]


def _parts(network: nn.Module, reader: Reader, moments: Moments, ridge: float) -> list[_Part]:
    """A reader's columns, those of each group of a grouped convolution by themselves."""
    size = len(reader.channels) // reader.groups
    found, variance = [], 0.0
    for group, rows in enumerate(reader.weight(network).chunk(reader.groups)):
        own = slice(group * size, (group + 1) * size)
        flat = rows.transpose(0, 1).flatten(1)
        gram, covariance = (flat @ flat.T).numpy(), moments.covariance[own, own].numpy()
        variance += float((gram * covariance).sum())
        scale = float(covariance.diagonal().mean())
        if scale > 0:  # else these columns read constants
            damped = covariance + ridge * scale * np.eye(size)
            inverse = np.linalg.inv(damped).astype(np.float64, copy=False)
            found.append(_Part(np.arange(own.start, own.stop), inverse, gram))
    for part in found:
        part.gram /= max(variance, np.finfo(np.float64).tiny)
    return found if variance > 0 else []


def _share(
    graph: ChannelGraph, reader: Reader, found: Sequence[_Part], parts: list[list[_Part]]
) -> None:
    """Give each channel group its own part of a reader."""
    own = np.full(graph.count, -1)  # the group of each channel
    place = np.zeros(graph.count, np.int64)  # its place there
    for number, group in enumerate(graph.groups):
        own[group.channels], place[group.channels] = number, np.arange(group.size)
    for part in found:
        channels = reader.channels[part.members]
        for number in np.unique(own[channels]).tolist():
            if number >= 0:
                at = np.flatnonzero(own[channels] == number)
                parts[number].append(part.taken(at, place[channels[at]]))


def _eliminated(parts: Sequence[_Part], size: int) -> Scores:
    """The loss up to and with the removal of each of ``size`` channels, all in the end."""
    scores, spent, left = np.zeros(size), 0.0, np.ones(size, bool)
    often = -(-size // STEPS)
    while left.any():
        count = min(often, int(left.sum()))
        gone = np.zeros(size, bool)
        for channel, loss in _cheapest(parts, left, count):
            spent += loss
            scores[channel], gone[channel] = spent, True
        for part in parts:
            part.remove(gone)
        left &= ~gone
    return scores


def _cheapest(parts: Sequence[_Part], left: Ids, count: int) -> Iterator[tuple[int, float]]:
    """The ``count`` channels that cost least, in turn, and their losses; out of a larger choice."""
    losses = np.where(left, _losses(parts, len(left)), np.inf)
    if count == 1:
        yield int(losses.argmin()), float(losses.min())
        return
    near = np.sort(np.argsort(losses, kind="stable")[: min(CHOICE * count, int(left.sum()))])
    places = np.full(len(left), -1)
    places[near] = np.arange(len(near))
    small = []
    for part in parts:
        members = places[part.members]
        small.append(part.taken(np.flatnonzero(members >= 0), members[members >= 0]))
    here = np.ones(len(near), bool)
    for _ in range(count):
        ((least, loss),) = _cheapest(small, here, 1)
        yield int(near[least]), loss
        gone = np.arange(len(near)) == least
        for part in small:
            part.remove(gone)
        here &= ~gone


def _losses(parts: Sequence[_Part], size: int) -> Scores:
    return sum((part.losses(size) for part in parts), np.zeros(size))
