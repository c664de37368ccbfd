"""Proof of a cut: the narrow network computes what the wide one does without those channels."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from job.errors import DataError, GammaslimError, UsageError, reason
from job.slimming.graph.snapshot import preserve_state
from job.slimming.graph.trace import tensors_in, trace_network, training_mode
from job.slimming.inputs import call_network, map_tensors, repeat_first_sample
from job.slimming.planning.plan import Proof, layers_of
from job.slimming.planning.ranked_groups import KeptChannels, rank_groups
from job.slimming.surgery.clone import clone_module
from job.slimming.surgery.comparison import explain_mismatch, relative_difference
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example
    from job.slimming.planning.layer_channels import LayerChannels, Layers

PROOF_TOLERANCE = 1e-9  # relative, in float64
NOISES = 16  # times
TRIES = 3
PROBES = 2  # pictures
SMALLER = (64, 96)  # pixels that a proof is made with, if larger pictures are treated alike


def probe_batch(example: Example) -> Any:
    """Noise in float64, on the CPU, in place of the floating-point tensors of ``example``.

    Of two samples; integers and booleans, which may be indices, are those of the first one.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.cpu()
        return torch.rand(tensor.shape, dtype=torch.float64, generator=generator)

    return map_tensors(repeat_first_sample(example, PROBES), noise)


def verify(
    wide: nn.Module,
    narrow: nn.Module,
    layers: Layers,
    example: Example,
    *,
    auxiliary: bool = False,
    odd: bool = False,
) -> Proof:
    """Compare the narrow network with the wide one without the removed channels.

    Both run on noise like ``example``, or smaller images where they are as good, on the CPU; in
    the wide one the removed channels are zeroed in front of every layer that sums over them. With
    ``auxiliary`` the heads that only run in train mode are compared too. Raises GammaslimError
    above the tolerance, and where only the wide network can be trained: a forward pass in train
    mode shows it, with ``odd`` a backward one too.
    """
    small = (
        example if auxiliary else smallest_equivalent_input(wide, example)
    )  # such heads have sizes of their own
    masked, expected, precision = _expected(wide, layers, small, auxiliary)
    try:
        # another seed: what depends on chance proves nothing
        found = _outputs(placed(narrow, precision), small, auxiliary, seed=1)
    except Exception as failure:  # anybody's network
        raise GammaslimError(f"the narrow network does not run: {reason(failure)}") from failure
    tolerance = PROOF_TOLERANCE
    if precision != torch.float64:
        tolerance = _noise(masked, expected, small, auxiliary)
    proof = Proof(
        relative_difference(found, expected), str(precision).removeprefix("torch."), tolerance
    )
    if not proof.error <= tolerance:
        explain_mismatch(masked, _noise_for(masked, small))
        raise GammaslimError(
            f"the cut is wrong: the narrow network differs from the wide one without those "
            f"channels by {proof}"
        )
    if (why := _training_error(narrow, example, odd)) and not _training_error(wide, example, odd):
        raise GammaslimError(f"the narrow network does not train, as the wide one does: {why}")
    return proof


def _expected(
    wide: nn.Module, layers: Layers, example: Example, auxiliary: bool
) -> tuple[nn.Module, list[torch.Tensor], torch.dtype]:
    """The wide network without the removed channels, its outputs, and in which precision."""
    try:
        masked = _masked(wide, layers, torch.float64)
        expected = _outputs(masked, example, auxiliary)
        if all(t.dtype == torch.float64 for t in expected if t.is_floating_point()):
            return masked, expected, torch.float64
    except Exception:  # anybody's network: float32 may be written into it
        pass
    own = _precision(wide)
    masked = _masked(wide, layers, own)
    try:
        return masked, _outputs(masked, example, auxiliary), own
    except Exception as failure:  # as of ops that only run on a GPU
        raise UsageError(
            f"a cut is proven on the CPU, where the network does not run: {reason(failure)}"
        ) from failure


def _noise(
    masked: nn.Module, expected: list[torch.Tensor], example: Example, auxiliary: bool
) -> float:
    """A tolerance: ``NOISES`` times what the outputs change by when each weight is rounded anew.

    That is by one unit in its last place, up or down, which narrow sums in another order are like.
    """
    generator, worst = torch.Generator().manual_seed(1), 0.0
    with torch.no_grad():
        for _ in range(TRIES):
            moved = clone_module(masked, {})
            for tensor in moved.parameters():
                if tensor.is_floating_point():
                    sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                    tensor.mul_(1 + sign.to(tensor.dtype) * torch.finfo(tensor.dtype).eps)
            worst = max(worst, relative_difference(_outputs(moved, example, auxiliary), expected))
    eps = max((torch.finfo(t.dtype).eps for t in expected if t.is_floating_point()), default=0.0)
    return NOISES * max(worst, eps)


def _training_error(network: nn.Module, example: Example, backward: bool) -> str | None:
    """Why a step of training fails on samples like those of ``example``, or None."""
    try:
        if backward:
            _step(network, example)
        else:
            trace_network(network, example, training=True)
    except Exception as error:  # anybody's network
        return reason(error)
    return None


def _step(network: nn.Module, example: Example) -> None:
    """A step forward and backward of a copy on the meta device; on the CPU where that fails."""
    try:
        trained = clone_module(network, placed_tensors(network, torch.device("meta")))
        _trained(trained, map_tensors(_noise_for(trained, example), lambda t: t.to("meta")))
    except Exception:  # meta tensors have no values, and some networks look at some
        trained = placed(network, _precision(network))
        _trained(trained, _noise_for(trained, example))


def _trained(network: nn.Module, batch: Example) -> None:
    with preserve_state(network), training_mode(network, training=True), torch.enable_grad():
        outputs = [t for t in tensors_in(call_network(network, batch)) if t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def smallest_equivalent_input(network: nn.Module, image: Example) -> Example:
    """The smallest image that ``network`` treats as it does ``image`` (B, C, H, W).

    That is by the same ops, on activations that have no other axis of size 1: each place of
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
    trace = trace_network(network, image)
    return [
        (
            op.name,
            *(trace.name(tensor) for tensor in op.inputs()),
            *(tuple(size == 1 for size in result.shape) for result in op.results()),
        )
        for op in trace.ops
    ]


def placed_tensors(
    network: nn.Module, device: torch.device, dtype: torch.dtype | None = None
) -> dict[int, Any]:
    """Copies of parameters and buffers by id of the original, floating ones in ``dtype``."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        new = tensor.detach().to(device, kind, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return memo


def placed(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU in ``dtype``."""
    return clone_module(network, placed_tensors(network, torch.device("cpu"), dtype)).cpu()


def _outputs(
    network: nn.Module, example: Example, auxiliary: bool, seed: int = 0
) -> list[torch.Tensor]:
    with preserve_state(network), _proof_mode(network, auxiliary), torch.inference_mode():
        torch.default_generator.manual_seed(seed)
        return list(tensors_in(call_network(network, _noise_for(network, example))))


def _noise_for(network: nn.Module, example: Example) -> Any:
    """Noise like ``example`` in the precision of the network."""
    kind = _precision(network)
    return map_tensors(probe_batch(example), lambda t: t.to(kind) if t.is_floating_point() else t)


def _precision(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _proof_mode(network: nn.Module, auxiliary: bool) -> Iterator[None]:
    """Eval mode; with ``auxiliary``, train mode for all but the layers themselves."""
    with training_mode(network, training=False):
        if auxiliary:
            for module in network.modules():
                module.training = any(True for _ in module.children())
        yield


def _masked(wide: nn.Module, layers: Layers, dtype: torch.dtype) -> nn.Module:
    """A copy whose readers have zeros for the removed channels: it does not see them."""
    masked = placed(wide, dtype)
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


def drop_wrong_suspects(network: nn.Module, graph: ChannelGraph, example: Example) -> ChannelGraph:
    """The graph without those suspects that a trial cut shows to be misunderstood.

    Suspects are groups that a view or a slice by fixed numbers may treat wrongly once they are
    smaller. All are tried together, and halves of them only where that fails.
    """
    names = list(dict.fromkeys(name for name, _ in graph.suspects))
    if not names:
        return graph
    if not graph.auxiliary:
        example = smallest_equivalent_input(network, example)
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
        narrow = apply_plan(network, layers)
        verify(network, narrow, layers, example, auxiliary=graph.auxiliary, odd=graph.odd)
    except (UsageError, DataError):
        raise
    except Exception:  # whatever a network raises that does not take fewer channels
        return False
    return True


def _trial(graph: ChannelGraph, names: list[str]) -> Ids:
    scores = np.random.Generator(np.random.Philox(0)).random(graph.count)
    groups = [r for r in rank_groups(graph, scores) if r.group.name in names]
    counts = [max(1, len(r.units) - max(1, len(r.units) // 3)) for r in groups]
    return KeptChannels(graph, groups)(counts)
