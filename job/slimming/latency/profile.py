"""Profiles of networks: the time of each layer, measured by hooks."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.slimming.graph.layer_rules import is_layer
from job.slimming.graph.layers import modules_of
from job.slimming.inputs import call_network, tensors_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from job.slimming.inputs import Example
    from job.slimming.latency.clock import Clock

MIN_PASSES, MAX_PASSES = 5, 200
WARMUP_PASSES = 2


@dataclass(frozen=True)
class LayerTime:
    """Time of one module in a pass, in ``seconds``, without its submodules.

    ``elements`` is the number of values in its outputs for one sample.
    """

    name: str
    kind: str
    seconds: float
    elements: int


@dataclass(frozen=True)
class Profile:
    """Times of all modules of a network, by name, in the order of their first calls.

    The time of ops outside layers, e.g. the sum of a residual block, belongs to the module whose
    code calls them. The whole network has the name "". ``input_sizes`` has the size of the first
    input of each module. ``after_layers`` has, for each layer with channels, the seconds from its
    end to the next layer with channels; "" is for the time before the first one.
    """

    layers: Mapping[str, LayerTime]
    input_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    after_layers: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of one pass."""
        return sum(layer.seconds for layer in self.layers.values())


def profile_alternately(
    networks: Sequence[tuple[nn.Module, Example]], clock: Clock, seconds: float
) -> list[Profile]:
    """Return the profile of each network on its inputs, measured in turn for ``seconds`` each.

    The networks are used as they are, e.g. in eval mode; the caller disables gradients.
    """
    probes = [_Probe(network, inputs, clock) for network, inputs in networks]
    end = clock.now() + seconds * len(probes)
    for number in range(MAX_PASSES):
        if number >= MIN_PASSES and clock.now() >= end:
            break
        for probe in probes:
            probe.run()
    return [probe.profile() for probe in probes]


class _Probe:
    """Measurement of the times of the modules of a network in each pass."""

    def __init__(self, network: nn.Module, inputs: Example, clock: Clock) -> None:
        self.network, self.inputs, self.clock = network, inputs, clock
        self.names = {module: name for name, module in modules_of(network, once=True).items()}
        self.channel_layers = {name for module, name in self.names.items() if is_layer(module)}
        self.passes: list[Mapping[str, float]] = []
        self.gaps: list[Mapping[str, float]] = []  # of each pass, by the layer before the gap
        self.elements: Counter[str] = Counter()
        self.input_sizes: dict[str, tuple[int, ...]] = {}
        self.order: dict[str, None] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the marks of the last pass."""
        self.marks: list[Any] = []
        self.owners: list[tuple[str, str]] = []  # module and last layer, after each mark
        self.stack: list[str] = []
        self.last = ""
        self.elements = Counter()

    def run(self) -> None:
        """Run the network once; the first call warms it up by a few more passes."""
        for _ in range(0 if self.passes else WARMUP_PASSES):
            call_network(self.network, self.inputs)
        self.begin()
        hooks = [module.register_forward_pre_hook(self._enter) for module in self.names]
        hooks += [module.register_forward_hook(self._leave) for module in self.names]
        try:
            call_network(self.network, self.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        times: dict[str, float] = defaultdict(float)
        gaps: dict[str, float] = defaultdict(float)
        for (owner, last), span in zip(self.owners, self.clock.spans(self.marks), strict=False):
            times[owner] += span
            if owner not in self.channel_layers:
                gaps[last] += span
        self.passes.append(times)
        self.gaps.append(gaps)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        name = self.names[module]
        size = next((tuple(tensor.shape) for tensor in tensors_in(inputs)), None)
        if size is not None:
            self.input_sizes.setdefault(name, size)
        self.order.setdefault(name)
        self.stack.append(name)
        self.owners.append((name, self.last))
        self.marks.append(self.clock.mark())

    def _leave(self, module: nn.Module, _inputs: Any, outputs: Any) -> None:
        self.marks.append(self.clock.mark())
        name = self.stack.pop()
        if name in self.channel_layers:
            self.last = name
        self.owners.append((self.stack[-1] if self.stack else "", self.last))
        self.elements[name] += sum(
            tensor.numel() // max(1, len(tensor)) for tensor in tensors_in(outputs) if tensor.dim()
        )

    def profile(self) -> Profile:
        """Return the lower quartile of each module's times over the passes.

        Other programs interrupt some passes, which affects the median of few passes.
        """
        kinds = {name: type(module).__name__ for module, name in self.names.items()}
        layers = {
            name: LayerTime(name, kinds[name], _quartile(self.passes, name), self.elements[name])
            for name in self.order
        }
        gaps = {name: _quartile(self.gaps, name) for each in self.gaps[:1] for name in each}
        return Profile(layers, self.input_sizes, gaps)


def _quartile(passes: Sequence[Mapping[str, float]], name: str) -> float:
    return float(np.quantile([times.get(name, 0.0) for times in passes], 0.25))


def random_images(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return normally distributed images of ``shape``; torch's global generators are not used.

    Zeros would distort the times, because processors are slower on denormal numbers.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tuple(shape), generator=generator).to(device, dtype)
