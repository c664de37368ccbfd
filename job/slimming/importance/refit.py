"""Importance by refit: the error of the consumers' outputs after a least-squares refit.

When a channel is removed, the weights of the kept channels are refitted by least squares. This is
the optimal brain surgeon (Hassibi & Stork 1993) for channels instead of weights. For a consumer
with weights W and input covariance C, the loss of removing channel j is |W_j|² / [C⁻¹]_jj. Channels
are removed greedily, the one with the smallest loss first; W and C⁻¹ are updated after each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.distributed.collectives import total
from job.processes import rank, world_size
from job.slimming.calibration.consumers import consumers_of
from job.slimming.calibration.moments import RowMoments

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from job.slimming.calibration.consumers import Consumer
    from job.slimming.calibration.input_statistics import InputStatistics
    from job.slimming.graph.groups import ChannelGraph, ChannelGroup
    from job.slimming.graph.union import Ids
    from job.slimming.importance.scores import Scores

Matrix = np.ndarray[Any, np.dtype[Any]]  # float64
COVARIANCE_RIDGE = 1e-3  # fraction of the mean variance, added to the diagonal
STEPS = 256  # for one group; a larger group loses several channels in each step
REMOVED = -1  # index of a removed channel
COMPACT = 0.75  # fraction of remaining columns at which the matrices of a part are reduced
CANDIDATES = 4  # per channel that a step removes


def refit_importance(
    network: nn.Module,
    graph: ChannelGraph,
    statistics: Mapping[str, InputStatistics],
    *,
    ridge: float = COVARIANCE_RIDGE,
) -> Scores:
    """Return the loss (count,) of removing each channel together with all less important ones.

    The loss is relative to the variance of a consumer's outputs and summed over the consumers of
    the channel. Channels of other groups are kept. The loss is nan for channels without a consumer
    in ``statistics``. Each process computes a share of the groups.
    """
    unknown = np.zeros(graph.count, bool)
    for slot in graph.slots:
        unknown[slot.ids] |= slot.side == "in"
    consumers = [c for c in consumers_of(network, graph) if c.layer in statistics]
    for consumer in consumers:
        unknown[consumer.channels] = False
    of_group = _consumers_of_groups(graph, consumers)
    pairs = zip(of_group, graph.groups, strict=True)
    own = _groups_of_process([len(places) * group.size**3 for places, group in pairs])
    last = {place: number for number in own for place in of_group[number]}
    parts: dict[int, list[_Part]] = {}  # of each consumer that this and a later group have
    scores, grouped = np.zeros(graph.count), np.zeros(graph.count, bool)
    for number in own:
        group = graph.groups[number]
        of_this: list[_Part] = []
        for place in of_group[number]:
            consumer = consumers[place]
            if place not in parts:
                measured = statistics[consumer.layer]
                parts[place] = _parts_of(network, consumer, measured, ridge)
            of_this += _select_group(group, consumer, parts[place])
            if last[place] == number:  # the matrices of all consumers would not fit into memory
                del parts[place]
        scores[group.channels] = _elimination_losses(of_this, group.size)
    device = next(network.parameters()).device
    scores = total(torch.from_numpy(scores).to(device)).cpu().numpy()
    for group in graph.groups:
        grouped[group.channels] = True
    scores[unknown | ~grouped] = np.nan
    return scores


def _groups_of_process(costs: Sequence[int]) -> list[int]:
    """Return the groups of this process, such that the costs of all processes are about equal."""
    loads, own = [0] * world_size(), []
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        least = loads.index(min(loads))
        loads[least] += costs[number]
        if least == rank():
            own.append(number)
    return sorted(own)


@dataclass
class _Part:
    """Columns of one consumer, or of one group of a grouped convolution, for some channels.

    ``members`` (n,) are the indices of the channels, or ``REMOVED``. ``inverse`` (n, n) is their
    part of C⁻¹. ``gram`` (n, n) is the Gram matrix of their weights, relative to the variance of
    the outputs.
    """

    members: Ids
    inverse: Matrix
    gram: Matrix

    def select(self, columns: Ids, members: Ids) -> _Part:
        """Return the part with the columns ``columns`` (n,), with new indices ``members``."""
        square = np.ix_(columns, columns)
        return _Part(members, self.inverse[square], self.gram[square])

    def losses(self, size: int) -> Scores:
        """Return the loss (size,) of removing each channel alone; 0 for other channels."""
        losses, present = np.zeros(size), np.flatnonzero(self.members != REMOVED)
        members = self.members[present]
        occurrences = np.bincount(members, minlength=size)
        if occurrences.max(initial=0) <= 1:
            single = self.gram.diagonal()[present] / self.inverse.diagonal()[present]
            losses[members] = single
            return losses.clip(0)
        order = present[np.argsort(members, kind="stable")]
        for times in np.unique(occurrences[occurrences > 0]):  # all columns of a channel
            columns = order[occurrences[self.members[order]] == times].reshape(-1, times)
            square = columns[:, :, None], columns[:, None, :]
            solved = np.linalg.solve(self.inverse[square], self.gram[square])
            losses[self.members[columns[:, 0]]] = np.trace(solved, axis1=1, axis2=2)
        return losses.clip(0)

    def remove(self, removed: Ids) -> None:
        """Refit the weights without the channels in the mask ``removed`` (size,).

        The matrices are updated in place, with matrix products of torch. Rows and columns of
        removed channels become zero, and are dropped when there are many.
        """
        gone = np.flatnonzero((self.members != REMOVED) & removed[self.members])
        if not len(gone):
            return
        rows, square = self.inverse[gone], np.ix_(gone, gone)
        # share of each removed weight that each kept weight takes over
        share = np.linalg.solve(self.inverse[square], rows).T
        half = self.gram[gone] - 0.5 * self.gram[square] @ share.T
        _subtract_product(self.gram, np.hstack([share, half.T]), np.vstack([half, share.T]))
        _subtract_product(self.inverse, share, rows)
        self.members[gone] = REMOVED
        stay = np.flatnonzero(self.members != REMOVED)
        if len(stay) <= COMPACT * len(self.members):
            square = np.ix_(stay, stay)
            self.inverse, self.gram = self.inverse[square], self.gram[square]
            self.members = self.members[stay]


def _subtract_product(matrix: Matrix, left: Matrix, right: Matrix) -> None:
    """Subtract ``left @ right`` from ``matrix`` in place, without a copy."""
    torch.from_numpy(matrix).addmm_(torch.from_numpy(left), torch.from_numpy(right), alpha=-1)


def _parts_of(
    network: nn.Module, consumer: Consumer, statistics: InputStatistics, ridge: float
) -> list[_Part]:
    """Return the parts of a consumer, one for each group of a grouped convolution."""
    size, parts, variance = len(consumer.channels) // consumer.groups, [], 0.0
    measured = statistics.overall()
    overall = measured.scatter[0] / max(1, measured.count)
    for group, rows in enumerate(consumer.weight(network).chunk(consumer.groups)):
        columns = slice(group * size, (group + 1) * size)
        flat = rows.transpose(0, 1).flatten(1)
        gram, covariance = flat @ flat.T, overall[columns, columns]
        variance += float((gram * covariance).sum())
        scale = float(covariance.diagonal().mean())
        if scale > 0:  # else the inputs are constant
            if isinstance(measured, RowMoments):
                inverse = _damped_inverse_of_rows(measured.rows[0, :, columns], ridge * scale)
            else:
                inverse = _damped_inverse(covariance, ridge * scale)
            members = np.arange(columns.start, columns.stop)
            parts.append(_Part(members, inverse.numpy(), gram.numpy()))
    for part in parts:
        part.gram /= max(variance, np.finfo(np.float64).tiny)
    return parts if variance > 0 else []


def _damped_inverse(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the inverse (n, n) of ``covariance``, with ``ridge`` added to its diagonal."""
    damped = covariance.clone()
    damped.diagonal().add_(ridge)
    inverse: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return inverse


def _damped_inverse_of_rows(rows: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the same for the covariance of ``rows`` (R, n), by the Woodbury identity."""
    inner = rows @ rows.T
    inner.diagonal().add_(ridge * len(rows))
    inverse: torch.Tensor = rows.T @ torch.linalg.solve(inner, rows) / -ridge
    inverse.diagonal().add_(1 / ridge)
    return inverse


def _consumers_of_groups(graph: ChannelGraph, consumers: Sequence[Consumer]) -> list[list[int]]:
    """Return, for each channel group, the places of the consumers that have channels of it."""
    group_of = np.full(graph.count, -1)
    for number, group in enumerate(graph.groups):
        group_of[group.channels] = number
    of_group: list[list[int]] = [[] for _ in graph.groups]
    for place, consumer in enumerate(consumers):
        for number in np.unique(group_of[consumer.channels]).tolist():
            if number >= 0:
                of_group[number].append(place)
    return of_group


def _select_group(
    group: ChannelGroup, consumer: Consumer, parts: Sequence[_Part]
) -> Iterator[_Part]:
    """Yield the columns of a channel group in each of the ``parts`` of a consumer."""
    for part in parts:
        channels = consumer.channels[part.members]
        columns = np.flatnonzero(np.isin(channels, group.channels))
        if len(columns):
            order = np.argsort(group.channels)
            places = order[np.searchsorted(group.channels, channels[columns], sorter=order)]
            yield part.select(columns, places)


def _elimination_losses(parts: Sequence[_Part], size: int) -> Scores:
    """Return the accumulated loss (size,) when each channel is removed, for all in turn."""
    scores, total_loss, remaining = np.zeros(size), 0.0, np.ones(size, bool)
    step = -(-size // STEPS)
    while remaining.any():
        count = min(step, int(remaining.sum()))
        removed = np.zeros(size, bool)
        for channel, loss in _least_important(parts, remaining, count):
            total_loss += loss
            scores[channel], removed[channel] = total_loss, True
        for part in parts:
            part.remove(removed)
        remaining &= ~removed
    return scores


def _least_important(
    parts: Sequence[_Part], remaining: Ids, count: int
) -> Iterator[tuple[int, float]]:
    """Yield the ``count`` channels with the smallest losses, one after the other, and the losses.

    If ``count`` is above 1, they are chosen among the channels with the smallest single losses.
    """
    losses = np.where(remaining, _summed_losses(parts, len(remaining)), np.inf)
    if count == 1:
        yield int(losses.argmin()), float(losses.min())
        return
    order = np.argsort(losses, kind="stable")
    candidates = np.sort(order[: min(CANDIDATES * count, int(remaining.sum()))])
    index_of = np.full(len(remaining), -1)
    index_of[candidates] = np.arange(len(candidates))
    small = []
    for part in parts:
        members = np.where(part.members != REMOVED, index_of[part.members], REMOVED)
        small.append(part.select(np.flatnonzero(members >= 0), members[members >= 0]))
    remaining_candidates = np.ones(len(candidates), bool)
    for _ in range(count):
        ((least, loss),) = _least_important(small, remaining_candidates, 1)
        yield int(candidates[least]), loss
        removed = np.arange(len(candidates)) == least
        for part in small:
            part.remove(removed)
        remaining_candidates &= ~removed


def _summed_losses(parts: Sequence[_Part], size: int) -> Scores:
    return sum((part.losses(size) for part in parts), np.zeros(size))
