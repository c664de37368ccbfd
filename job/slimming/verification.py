"""Proof of a cut: the narrow network computes what the wide one does without those channels."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from job.errors import DataError, GammaslimError, UsageError, reason
from job.slimming.comparison import difference, explain
from job.slimming.inputs import call, mapped, repeated
from job.slimming.plan import layers_of
from job.slimming.policy import Choice, ranked
from job.slimming.record import mode, record, tensors_in
from job.slimming.surgery import copied, narrowed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.slimming.flow import Ids
    from job.slimming.graph import ChannelGraph
    from job.slimming.inputs import Example
    from job.slimming.plan import LayerChannels, Layers

TOLERANCE = 1e-9  # relative, in float64
PROBES = 2  # pictures
SMALLER = (64, 96)  # pixels that a proof is made with, if larger pictures are treated alike


def probe(example: Example) -> Any:
    """Noise in float64, on the CPU, in place of the floating-point tensors of ``example``.

    Of two samples; integers and booleans, which may be indices, are those of the first one.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.cpu()
        return torch.rand(tensor.shape, dtype=torch.float64, generator=generator)

    return mapped(repeated(example, PROBES), noise)


def verify(
    wide: nn.Module,
    narrow: nn.Module,
    layers: Layers,
    example: Example,
    *,
    auxiliary: bool = False,
) -> float:
    """Largest error of the narrow network's outputs, relative to the largest output.

    Both run on noise like ``example``, or smaller images where they are as good, in float64 on
    the CPU; in the wide one the removed channels are zeroed in front of every layer that sums over
    them. With ``auxiliary`` the heads that only run in train mode are compared too. Raises
    GammaslimError above 1e-9.
    """
    if not auxiliary:  # such heads have sizes of their own
        example = smaller(wide, example)
    masked = _masked(wide, layers)
    expected = _outputs(masked, example, auxiliary)
    try:
        found = _outputs(_in_float64(narrow), example, auxiliary)
    except Exception as failure:  # anybody's network
        raise GammaslimError(f"the narrow network does not run: {reason(failure)}") from failure
    error = difference(found, expected)
    if not error <= TOLERANCE:
        explain(masked, probe(example))
        raise GammaslimError(
            f"the cut is wrong: the narrow network differs from the wide one without those "
            f"channels by {error:.1e}, above {TOLERANCE:.0e}"
        )
    return error


def smaller(network: nn.Module, image: Example) -> Example:
    """The smallest image that ``network`` treats as it does ``image`` (B, C, H, W).

    That is by the same operations, on activations that have no other axis of size 1: each place of
    a kernel still sees some input. ``image`` itself where there is none, or it is no image.
    """
    if not (isinstance(image, torch.Tensor) and image.is_floating_point()):
        return image
    sides = image.shape[2:]
    sizes = [size for size in SMALLER if sides and 2 * size <= min(sides)]
    if not sizes:
        return image
    wanted = _treatment(network, image)
    for size in sizes:
        small = [max(size, round(side * size / min(sides))) for side in sides]
        candidate = image.new_zeros(()).expand(1, image.shape[1], *small)
        try:
            if _treatment(network, candidate) == wanted:
                return candidate
        except Exception:  # anybody's network, on pictures that may be too small for it
            continue
    return image


def _treatment(network: nn.Module, image: torch.Tensor) -> list[tuple[object, ...]]:
    """What is done to pictures like ``image``, however large they are."""
    recording = record(network, image)
    return [
        (
            operation.name,
            *(recording.name(tensor) for tensor in operation.inputs()),
            *(tuple(size == 1 for size in result.shape) for result in operation.results()),
        )
        for operation in recording.operations
    ]


def _in_float64(network: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            double = tensor.detach().to("cpu", torch.float64, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(double) if is_parameter else double
    return copied(network, memo).cpu()


def _outputs(network: nn.Module, example: Example, auxiliary: bool) -> list[torch.Tensor]:
    with _proof_mode(network, auxiliary), torch.inference_mode():
        return list(tensors_in(call(network, probe(example))))


@contextmanager
def _proof_mode(network: nn.Module, auxiliary: bool) -> Iterator[None]:
    """Eval mode; with ``auxiliary``, train mode for all but the layers themselves."""
    with mode(network, training=False):
        if auxiliary:
            for module in network.modules():
                module.training = any(True for _ in module.children())
        yield


def _masked(wide: nn.Module, layers: Layers) -> nn.Module:
    """A copy whose readers have zeros for the removed channels: it does not see them."""
    masked = _in_float64(wide)
    with torch.no_grad():
        for name, channels in layers.items():
            if channels.in_ is not None:
                _zero_columns(masked, name, channels)
    return masked


def _zero_columns(network: nn.Module, name: str, channels: LayerChannels) -> None:
    try:
        weight, groups = network.get_parameter(name), 1
    except AttributeError:
        layer = network.get_submodule(name)
        weight, groups = layer.get_parameter("weight"), int(getattr(layer, "groups", 1))
    if groups > 1 and weight.shape[1] == 1:
        return  # depthwise: it passes channels, and sums over none
    seen = torch.zeros(weight.shape[1] * groups, dtype=weight.dtype)
    seen[list(channels.in_ or ())] = 1
    rows = seen.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
    weight.mul_(rows.view(*rows.shape, *[1] * (weight.dim() - 2)))


def settled(network: nn.Module, graph: ChannelGraph, example: Example) -> ChannelGraph:
    """The graph without those suspects that a trial cut shows to be misunderstood.

    Suspects are groups that a view or a slice by fixed numbers may treat wrongly once they are
    smaller. All are tried together, and halves of them only where that fails.
    """
    names = list(dict.fromkeys(name for name, _ in graph.suspects))
    if not names:
        return graph
    if not graph.auxiliary:
        example = smaller(network, example)
    if _passes(network, graph, names, example):
        return graph
    reasons = dict(graph.suspects)
    for name in _failing(network, graph, names, example):
        reason = f"{reasons[name]} works for the present number of channels only"
        graph = graph.without([name], reason)
    known = {group.name for group in graph.groups}
    left = [name for name in names if name in known]
    if left and not _passes(network, graph, left, example):
        graph = graph.without(left, "moved in a way that is not understood")
    return graph


def _failing(
    network: nn.Module, graph: ChannelGraph, names: list[str], example: Example
) -> list[str]:
    """Those whose trial cut is wrong by itself, of some groups whose cut together is."""
    if len(names) == 1:
        return names
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    wrong = [half for half in halves if not _passes(network, graph, half, example)]
    return [name for half in wrong for name in _failing(network, graph, half, example)]


def _passes(network: nn.Module, graph: ChannelGraph, names: list[str], example: Example) -> bool:
    """Whether a cut of about a third of the channels of some groups is right.

    Raises UsageError or DataError for a network that no cut of can be proven.
    """
    layers = layers_of(graph, _trial(graph, names))
    try:
        verify(network, narrowed(network, layers), layers, example, auxiliary=graph.auxiliary)
    except (UsageError, DataError):
        raise
    except Exception:  # whatever a network raises that does not take fewer channels
        return False
    return True


def _trial(graph: ChannelGraph, names: list[str]) -> Ids:
    scores = np.random.Generator(np.random.Philox(0)).random(graph.count)
    groups = [r for r in ranked(graph, scores) if r.group.name in names]
    counts = [max(1, len(r.units) - max(1, len(r.units) // 3)) for r in groups]
    return Choice(graph, groups)(counts)
