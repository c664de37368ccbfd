"""Make the narrow network's layers compute what the wide one's did, by least squares.

One layer after the other in the order of the data flow: what it read in the wide network is written
as M · x + b of what it reads in the narrow one, whose layers before it are done already, so that
errors do not pile up. M goes into its weights, b into its bias (He et al. 2017, section 3.2). For
the first layer behind a cut this is A · kept + b for each removed channel.
"""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from job.errors import UsageError
from job.slimming.calibration.moments import RIDGE, Sums, inputs_of, readers, rows_of, values_of
from job.slimming.calibration.paused_forward import (
    forward_passes,
    keeps_activations,
    standing_bytes,
)
from job.slimming.compensation.folding import columns_of, norms_behind, rebuild
from job.slimming.graph.snapshot import Snapshot, preserve_state
from job.slimming.graph.trace import eval_with_hooks
from job.slimming.inputs import batch_signature, call_network, concatenate, sample_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from job.slimming.calibration.moments import Batch, Moments, Reader
    from job.slimming.calibration.paused_forward import ForwardPass
    from job.slimming.compensation.folding import Fit
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example
    from job.slimming.planning.layer_channels import Layers

    Progress = Callable[[str, int, int], None]  # what is done next, and which of how many (or 0)

MOST_BYTES = 2**31  # of what all passes keep while they stand
MOST_PASSES = 8  # in each network


def quiet(_step: str, _number: int, _count: int) -> None:
    """Show no progress: a library prints nothing."""


def regress(
    wide: nn.Module,
    narrow: nn.Module,
    graph: ChannelGraph,
    keep: Ids,
    layers: Layers,
    batches: Callable[[], Iterable[Batch]],
    example: Example,
    *,
    ridge: float = RIDGE,
    check: Callable[[], None] = lambda: None,
    progress: Progress = quiet,
) -> None:
    """Fit every layer of ``narrow`` behind the first cut anew, in place.

    ``narrow`` is ``wide`` cut to ``layers``, as ``with_biases`` gave them. ``batches`` gives those
    of this process, maybe none; as many count as their passes fit into 2 GiB. Padding counts as if
    b were added to it too. ``check`` is called before every layer, and may raise. Raises UsageError
    when no process has any pictures.
    """
    norms, todo, behind = norms_behind(narrow, example), [], False
    for reader in readers(wide, graph):
        behind |= not keep[reader.channels].all()
        todo += [reader] if behind else []
    if not todo:
        return
    progress("reconstructing layers", 0, 0)
    pairs, seen = _Pairs(wide, narrow, graph, batches(), example), False
    with pairs.standing(todo):
        for number, reader in enumerate(todo, start=1):
            check()
            progress("reconstructing layer", number, len(todo))
            kept = int(keep[reader.channels].sum())
            moments = pairs.moments(reader, kept)
            if moments.count:
                seen = True
                fits = _fits(reader, keep, kept, moments, ridge)
                rebuild(wide, narrow, reader, layers, fits, norms)
    if not seen:
        raise UsageError("--compensate regress: calibration images are needed, there are none")


class _Pairs:
    """The same pictures in the narrow and in the wide network."""

    def __init__(
        self,
        wide: nn.Module,
        narrow: nn.Module,
        graph: ChannelGraph,
        batches: Iterable[Batch],
        example: Example,
    ) -> None:
        self.networks = narrow, wide
        self.often = Counter(call.weight for call in graph.calls)
        most = max(1, MOST_BYTES // (2 * standing_bytes(wide, example)))
        inputs = list(_first(map(inputs_of, batches), most))
        self.step = max(
            map(sample_count, inputs), default=1
        )  # readings of so many are added at a time
        keeps = keeps_activations(wide, example)
        self.inputs = list(
            _joined(inputs, len(inputs) if keeps else -(-len(inputs) // MOST_PASSES))
        )
        # no pass may stand still while it holds a lock, or another one takes what it keeps
        self.alone = Snapshot(wide).locks or (keeps and len(self.inputs) > 1)
        self.passes: list[list[ForwardPass]] = []

    @contextmanager
    def standing(self, todo: Sequence[Reader]) -> Iterator[None]:
        """Passes that can stand in front of each layer of ``todo``."""
        names = [reader.layer for reader in todo]
        with ExitStack() as stack:
            stack.enter_context(preserve_state(self.networks[1]))
            for network in self.networks:
                layers = map(network.get_submodule, names)
                passes = stack.enter_context(forward_passes(network, layers, self.inputs))
                self.passes.append(passes)
            yield

    def moments(self, reader: Reader, kept: int) -> Moments:
        """Moments of what is read: ``kept`` columns in the narrow network, then all in the wide.

        Covariances are those of the former with all.
        """
        width = kept + len(reader.channels)
        layer = self.networks[1].get_submodule(reader.layer)
        sums = Sums(kept, width, layer.get_parameter("weight").device)
        for number in range(len(self.inputs)):
            for both in zip(*self._read(reader, number), strict=True):
                parts = (values.split(self.step) for values in both)
                for pair in zip(*parts, strict=True):
                    sums.add(torch.cat([rows_of(values, width) for values in pair], 1))
        return sums.result(reader.layer)

    def _read(self, reader: Reader, number: int) -> list[list[torch.Tensor]]:
        """What the layer reads of some pictures in each network, at each of its calls."""
        often, found = self.often[f"{reader.layer}.weight"], []
        for network, passes in zip(self.networks, self.passes, strict=True):
            layer, values = network.get_submodule(reader.layer), []
            if often == 1 and not self.alone:
                read = passes[number].until(layer)
                values = [] if read is None else [values_of(layer, read, reader)]
            elif often:  # the last of its calls comes behind layers that it feeds itself
                values = _inputs(network, layer, reader, self.inputs[number])
            found.append(values)
        return found


def _first(batches: Iterable[Example], most: int) -> Iterator[Example]:
    """The first batches, of ``most`` samples or a few more."""
    for batch in batches:
        yield batch
        most -= sample_count(batch)
        if most <= 0:
            return


def _joined(batches: Sequence[Example], count: int) -> Iterator[Any]:
    """``count`` batches at a time as one, where they are of one size."""
    for _, alike in itertools.groupby(batches, key=batch_signature):
        while some := list(itertools.islice(alike, count)):
            yield concatenate(some)


def _inputs(
    network: nn.Module, layer: nn.Module, reader: Reader, batch: Example
) -> list[torch.Tensor]:
    """What a layer reads of ``batch`` at each of its calls; the pass is one of its own."""
    found: list[torch.Tensor] = []

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # a copy: the next layer may work in place
        found.append(values_of(layer, inputs[0], reader).clone())

    with eval_with_hooks(network, [(layer, hook)]):
        call_network(network, batch)
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
