"""Make the narrow network's layers compute what the wide one's did, by least squares.

One layer after the other in the order of the data flow: what it read in the wide network is written
as M · x + b of what it reads in the narrow one, whose layers before it are done already, so that
errors do not pile up. M goes into its weights, b into its bias (He et al. 2017, section 3.2). For
the first layer behind a cut this is A · kept + b for each removed channel.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from job.errors import UsageError
from job.slimming.compensation import columns_of, norms_behind, rebuild
from job.slimming.moments import Sums, images_of, readers, rows_of, values_of
from job.slimming.record import observed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from job.slimming.compensation import Fit
    from job.slimming.flow import Ids
    from job.slimming.graph import ChannelGraph
    from job.slimming.moments import Batch, Moments, Reader
    from job.slimming.plan import Layers

RIDGE = 1e-3  # of the mean variance


def regress(
    wide: nn.Module,
    narrow: nn.Module,
    graph: ChannelGraph,
    keep: Ids,
    layers: Layers,
    batches: Callable[[], Iterable[Batch]],
    image: torch.Tensor,
    *,
    ridge: float = RIDGE,
) -> None:
    """Fit every layer of ``narrow`` behind the first cut anew, in place.

    ``narrow`` is ``wide`` cut to ``layers``, as ``with_biases`` gave them. ``batches`` gives those
    of this process, maybe none, once for every layer. Padding counts as if b were added to it too.
    Raises UsageError when no process has any.
    """
    norms, behind, seen = norms_behind(narrow, image), False, False
    for reader in readers(wide, graph):
        behind |= not keep[reader.channels].all()
        if not behind:
            continue
        kept = int(keep[reader.channels].sum())
        moments = _paired(wide, narrow, graph, reader, kept, batches())
        if moments.count:
            seen = True
            rebuild(wide, narrow, reader, layers, _fits(reader, keep, kept, moments, ridge), norms)
    if behind and not seen:
        raise UsageError("--compensate regress: calibration pictures are needed, there are none")


class _EnoughError(BaseException):
    """Ends a forward pass: what comes behind a layer need not be computed."""


def _paired(
    wide: nn.Module,
    narrow: nn.Module,
    graph: ChannelGraph,
    reader: Reader,
    kept: int,
    batches: Iterable[Batch],
) -> Moments:
    """Moments of what a reader reads: the ``kept`` columns in ``narrow``, then all in ``wide``.

    Covariances are those of the former with all.
    """
    width = kept + len(reader.channels)
    layer = wide.get_submodule(reader.layer)
    sums = Sums(kept, width, layer.get_parameter("weight").device)
    once = sum(call.weight == f"{reader.layer}.weight" for call in graph.calls) == 1
    for batch in batches:
        read = [_inputs(network, reader, images_of(batch), once) for network in (narrow, wide)]
        for both in zip(*read, strict=True):
            sums.add(torch.cat([rows_of(values, width) for values in both], 1))
    return sums.result(reader.layer)


def _inputs(
    network: nn.Module, reader: Reader, images: torch.Tensor, once: bool
) -> list[torch.Tensor]:
    """What a reader reads of ``images``, at each of its calls."""
    found: list[torch.Tensor] = []

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # a copy: the next layer may work in place
        found.append(values_of(layer, inputs[0], reader).clone())
        if once:
            raise _EnoughError

    with (
        suppress(_EnoughError),
        observed(network, [(network.get_submodule(reader.layer), hook)]),
    ):
        network(images)
    return found


def _fits(reader: Reader, keep: Ids, kept: int, moments: Moments, ridge: float) -> list[Fit]:
    """M (C, K) and b (C,) for each group of a reader.

    The ridge draws M to what a plain cut is: each kept channel itself, nothing of the others.
    """
    fits, start = [], 0
    for part, stays in columns_of(reader, keep):
        now = slice(start, start + int(stays.sum()))
        then = slice(kept + part.start, kept + part.stop)
        start = now.stop
        slope = torch.eye(len(stays)).double()[:, stays]
        inner, cross = moments.covariance[now, now], moments.covariance[now, then]
        scale = inner.diagonal().mean()
        if scale > 0:
            missed = cross - inner @ slope.T
            damped = inner + ridge * scale * torch.eye(len(inner)).double()
            slope = slope + torch.linalg.solve(damped, missed).T
        fits.append((slope, moments.mean[then] - slope @ moments.mean[now]))
    return fits
