"""Reconstruction: the layers of the narrow network compute what the wide ones did.

Layers are fitted by least squares, one after the other in the order of the data flow. The input of
a layer in the wide network is expressed as M · x + b of its input x in the narrow network, whose
earlier layers are already fitted, so that errors do not add up. M is folded into the weights of the
layer, b into its bias (He et al. 2017, section 3.2).
"""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from job.errors import UsageError
from job.slimming.calibration.batch import inputs_of
from job.slimming.calibration.consumers import input_values, sample_rows
from job.slimming.calibration.input_statistics import RIDGE, RunningStatistics
from job.slimming.calibration.paused_forward import forward_passes
from job.slimming.calibration.progress import no_progress
from job.slimming.graph.modes import eval_with_hooks
from job.slimming.graph.snapshot import Snapshot, preserve_state
from job.slimming.inputs import batch_signature, call_network, concatenate, sample_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.calibration.consumers import Consumer
    from job.slimming.calibration.input_statistics import InputStatistics
    from job.slimming.calibration.paused_forward import ForwardPass
    from job.slimming.calibration.progress import Progress
    from job.slimming.compensation.cut_pair import CutPair, Fit
    from job.slimming.inputs import Example

MOST_BYTES = 2**31  # that all passes together keep while they are paused
MOST_PASSES = 8  # in each network


def reconstruct(
    pair: CutPair,
    batches: Iterable[CalibrationBatch],
    *,
    ridge: float = RIDGE,
    progress: Progress = no_progress,
) -> None:
    """Fit every layer of the narrow network that comes after the first cut, in place.

    ``batches`` are those of this process, possibly none; as many are used as fit into 2 GiB while
    their passes are paused. Padded borders are treated as if b was added to the padding too.
    Raises UsageError where no process has images.
    """
    consumers = list(
        itertools.dropwhile(lambda c: bool(pair.keep[c.channels].all()), pair.consumers())
    )
    if not consumers:
        return
    progress("reconstructing layers", 0, 0)
    passes, fitted = _PairedPasses(pair, batches), False
    with passes.started(consumers):
        for number, consumer in enumerate(consumers, start=1):
            progress("reconstructing layer", number, len(consumers))
            kept = int(pair.keep[consumer.channels].sum())
            statistics = passes.statistics(consumer, kept)
            if statistics.count:
                fitted = True
                pair.apply_fits(consumer, _solve_fits(pair, consumer, kept, statistics, ridge))
    if not fitted:
        raise UsageError("--compensate regress: calibration images are needed, there are none")


class _PairedPasses:
    """Forward passes of the same images through the narrow and the wide network."""

    def __init__(self, pair: CutPair, batches: Iterable[CalibrationBatch]) -> None:
        self.networks = pair.narrow, pair.wide
        facts = pair.graph.forward
        self.calls = Counter(call.weight for call in pair.graph.calls)
        most = max(1, MOST_BYTES // (2 * facts.bytes_per_sample))
        inputs = list(_first_samples(map(inputs_of, batches), most))
        # the rows of so many samples are added in one call
        self.step = max(map(sample_count, inputs), default=1)
        joined = len(inputs) if facts.keeps_activations else -(-len(inputs) // MOST_PASSES)
        self.inputs = list(_concatenated(inputs, joined))
        # a paused pass may hold a lock, or see activations that another one has stored
        several = len(self.inputs) > 1
        self.unpaused = Snapshot(pair.wide).has_locks or (facts.keeps_activations and several)
        self.passes: list[list[ForwardPass]] = []

    @contextmanager
    def started(self, consumers: Sequence[Consumer]) -> Iterator[None]:
        """Start passes that can pause before each of ``consumers``."""
        names = [consumer.layer for consumer in consumers]
        with ExitStack() as stack:
            stack.enter_context(preserve_state(self.networks[1]))
            for network in self.networks:
                layers = map(network.get_submodule, names)
                passes = stack.enter_context(forward_passes(network, layers, self.inputs))
                self.passes.append(passes)
            yield

    def statistics(self, consumer: Consumer, kept: int) -> InputStatistics:
        """Return statistics of the ``kept`` narrow inputs of a consumer, followed by its wide ones.

        Covariances are those of the narrow inputs with all.
        """
        width = kept + len(consumer.channels)
        layer = self.networks[1].get_submodule(consumer.layer)
        running = RunningStatistics(kept, width, layer.get_parameter("weight").device)
        for number in range(len(self.inputs)):
            for narrow_and_wide in zip(*self._inputs(consumer, number), strict=True):
                parts = (values.split(self.step) for values in narrow_and_wide)
                for pair in zip(*parts, strict=True):
                    running.add(torch.cat([sample_rows(values, width) for values in pair], 1))
        return running.result(consumer.layer)

    def _inputs(self, consumer: Consumer, number: int) -> list[list[torch.Tensor]]:
        """The inputs of a consumer for one batch in each network, at each of its calls."""
        calls, inputs = self.calls[f"{consumer.layer}.weight"], []
        for network, passes in zip(self.networks, self.passes, strict=True):
            layer, values = network.get_submodule(consumer.layer), []
            if calls == 1 and not self.unpaused:
                paused = passes[number].run_until(layer)
                values = [] if paused is None else [input_values(layer, paused, consumer)]
            elif calls:  # its last call comes after layers that its first call feeds
                values = _whole_pass(network, layer, consumer, self.inputs[number])
            inputs.append(values)
        return inputs


def _first_samples(batches: Iterable[Example], most: int) -> Iterator[Example]:
    """The first batches, until they hold ``most`` samples or more."""
    for batch in batches:
        yield batch
        most -= sample_count(batch)
        if most <= 0:
            return


def _concatenated(batches: Sequence[Example], count: int) -> Iterator[Any]:
    """Batches joined ``count`` at a time where they have the same shape."""
    for _, alike in itertools.groupby(batches, key=batch_signature):
        while some := list(itertools.islice(alike, count)):
            yield concatenate(some)


def _whole_pass(
    network: nn.Module, layer: nn.Module, consumer: Consumer, batch: Example
) -> list[torch.Tensor]:
    """The inputs of a layer at each of its calls, from a pass that is not paused."""
    inputs_seen: list[torch.Tensor] = []

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # a copy: the next layer may work in place
        inputs_seen.append(input_values(layer, inputs[0], consumer).clone())

    with eval_with_hooks(network, [(layer, hook)]):
        call_network(network, batch)
    return inputs_seen


def _solve_fits(
    pair: CutPair, consumer: Consumer, kept: int, statistics: InputStatistics, ridge: float
) -> list[Fit]:
    """M (C, K) and b (C,) for each group of a consumer.

    The ridge pulls M to the plain cut: each kept channel is itself, removed channels are zero.
    """
    fits, start = [], 0
    for part, stays in pair.kept_columns(consumer):
        narrow = slice(start, start + int(stays.sum()))
        wide = slice(kept + part.start, kept + part.stop)
        start = narrow.stop
        slope = torch.eye(len(stays)).double()[:, stays]
        inner, cross = statistics.covariance[narrow, narrow], statistics.covariance[narrow, wide]
        scale = inner.diagonal().mean()
        if scale > 0:
            missed = cross - inner @ slope.T
            damped = inner + ridge * scale * torch.eye(len(inner)).double()
            slope = slope + torch.linalg.solve(damped, missed).T
        fits.append((slope, statistics.mean[wide] - slope @ statistics.mean[narrow]))
    return fits
