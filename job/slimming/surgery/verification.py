"""Verification of a cut: the narrow network equals the wide one without the removed channels.

Both run on noise in float64, or in the precision of the network if it does not run in float64.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.errors import GammaslimError, UsageError, WrongCutError, is_out_of_memory, reason
from job.slimming.graph.layer_rules import layer_rule
from job.slimming.graph.layers import inputs_axis, is_depthwise, tensor_named
from job.slimming.graph.modes import training_mode
from job.slimming.graph.snapshot import Snapshot, preserve_state, snapshot_of_all
from job.slimming.graph.trace import trace_with_snapshot
from job.slimming.inputs import call_network, map_tensors, tensors_in
from job.slimming.planning.measurements import Proof
from job.slimming.planning.plan import keep_in
from job.slimming.surgery.clone import clone_module, clone_to
from job.slimming.surgery.comparison import check_comparable, relative_difference
from job.slimming.surgery.kept_channels import KeptReads
from job.slimming.surgery.probe import smallest_equivalent_input
from job.slimming.surgery.probe_pass import Probe, noise_for, precision_of
from job.slimming.surgery.removal import set_exact_constants
from job.slimming.surgery.scales import set_exact_scales
from job.slimming.surgery.zero_weights import fill_zero_weights

if TYPE_CHECKING:
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example
    from job.slimming.planning.layer_channels import LayerChannels, Layers

PROOF_TOLERANCE = 1e-9  # relative, in float64
MAGNIFIED_TOLERANCE = 1e-6  # where rounding has a larger effect, e.g. before a norm of small values
ROUNDING_MARGIN = 16  # tolerance relative to the effect of rounding, in other precisions
ROUNDING_TRIALS = 3  # random roundings whose largest effect counts


def verify(
    wide: nn.Module,
    narrow: nn.Module,
    layers: Layers,
    example: Example,
    graph: ChannelGraph | None = None,
) -> Proof:
    """Compare the narrow network with the wide one without the removed channels.

    Both run on the CPU on noise like ``example``, or on smaller images that prove as much. In a
    copy of the wide network, the removed channels are zeroed before every layer that sums over
    them, and take no part in ops that compute over channels without a weight, such as a LayerNorm.
    Weights that are all zero are replaced by noise in both, since they hide what is before them.
    Random numbers that the networks draw for each value are the same constant in both.
    With ``graph``, the graph of the wide network on ``example``, the network is not traced again.
    If the graph is ``auxiliary``, the heads that run only in train mode are compared too.

    Raises WrongCutError if the difference is above the tolerance, or if only the wide network can
    be trained. This is tested by a forward pass in train mode, and by a backward pass if the graph
    is ``odd``. Raises UsageError if no cut of the network can be verified.
    """
    auxiliary, odd = (graph.auxiliary, graph.odd) if graph else (False, False)
    small = smallest_equivalent_input(wide, example, graph)
    kept = None if graph is None else KeptReads(graph.reads, keep_in(graph, layers))
    pair = _Pair(*fill_zero_weights(wide, narrow, layers), layers, kept)
    snapshot = snapshot_of_all(narrow)
    proof, precision, widened = pair.prove(Probe(small, auxiliary, snapshot))
    if not proof.error <= proof.tolerance:
        masked = pair.masked(precision)
        check_comparable(masked, noise_for(masked, small), widened)
        raise WrongCutError(
            f"the cut is wrong: the narrow network differs from the wide one without the removed "
            f"channels by {proof}"
        )
    why = _training_error(narrow, example, snapshot, odd)
    if why and not _training_error(wide, example, Snapshot(wide), odd):
        raise WrongCutError(f"the narrow network does not train, as the wide one does: {why}")
    return proof


@dataclass(frozen=True)
class _Pair:
    """A wide network and the narrow one that is cut from it, to compare."""

    wide: nn.Module
    narrow: nn.Module
    layers: Layers
    kept: KeptReads | None

    def masked(self, precision: torch.dtype) -> nn.Module:
        """Return the wide network without the removed channels."""
        return _masked(self.wide, self.layers, precision)

    def prove(self, probe: Probe) -> tuple[Proof, torch.dtype, bool]:
        """Return the proof, whose error may be too large, its precision, and whether it is widened.

        Where rounding in the precision that the code asks for hides the error, it is computed in
        float64.
        """
        expected, precision = self._expected(probe)
        error = self._error(probe, precision, expected)
        if precision != torch.float64:
            tolerance = self._rounding(probe, precision, expected)
            if tolerance < 1:
                return Proof(error, _name(precision), tolerance), precision, False
        elif not PROOF_TOLERANCE < error < MAGNIFIED_TOLERANCE:
            return Proof(error, _name(precision), PROOF_TOLERANCE), precision, False
        widened, double = probe._replace(widened=True), torch.float64
        try:
            expected = widened.outputs(partial(self.masked, double), self.kept)
            error, probe = self._error(widened, double, expected), widened
        except Exception as failure:  # the code does not run so
            if precision != double:
                raise self._hidden_by_rounding(probe, precision) from failure
        tolerance = max(PROOF_TOLERANCE, self._rounding(probe, double, expected))
        proof = Proof(error, _name(double), min(tolerance, MAGNIFIED_TOLERANCE))
        return proof, double, probe.widened

    def _expected(self, probe: Probe) -> tuple[list[torch.Tensor], torch.dtype]:
        """Return the outputs of the wide network, and their precision."""
        with suppress(Exception):  # user code may require float32
            expected = probe.outputs(partial(self.masked, torch.float64), self.kept)
            if all(t.dtype == torch.float64 for t in expected if t.is_floating_point()):
                return expected, torch.float64
        precision = precision_of(self.wide)
        try:
            return probe.outputs(partial(self.masked, precision), self.kept), precision
        except Exception as failure:  # e.g. ops that run on a GPU only
            raise UsageError(
                f"a cut is verified on the CPU, where the network does not run: {reason(failure)}"
            ) from failure

    def _error(self, probe: Probe, precision: torch.dtype, expected: list[torch.Tensor]) -> float:
        """Return the difference of the outputs of the narrow network from those ``expected``.

        Raises GammaslimError if it does not run.
        """
        try:
            outputs = probe.outputs(partial(self._exact, precision))
        except Exception as failure:  # user code may raise anything
            raise _not_running(failure) from failure
        return relative_difference(outputs, expected)

    def _exact(self, precision: torch.dtype) -> nn.Module:
        """Return a copy of the narrow network in another precision."""
        copy = clone_to(self.narrow, "cpu", precision).cpu()
        set_exact_constants(copy, self.wide, self.layers)
        set_exact_scales(copy, self.wide, self.layers)
        return copy

    def _rounding(
        self, probe: Probe, precision: torch.dtype, expected: list[torch.Tensor]
    ) -> float:
        """Return ``ROUNDING_MARGIN`` times the change of the outputs under random rounding.

        Each weight changes by one unit in its last place, up or down. This is similar to the sums
        of the narrow network, which are taken in another order.
        """
        masked, worst = self.masked(precision), 0.0
        with torch.no_grad():
            for seed in range(1, 1 + ROUNDING_TRIALS):
                moved = probe.outputs(partial(_rounded, masked, seed), self.kept)
                worst = max(worst, relative_difference(moved, expected))
        eps = max((torch.finfo(t.dtype).eps for t in expected if t.is_floating_point()), default=0)
        return ROUNDING_MARGIN * max(worst, eps)

    def _hidden_by_rounding(self, probe: Probe, precision: torch.dtype) -> UsageError:
        masked = self.masked(precision)
        check_comparable(masked, noise_for(masked, probe.example))
        return UsageError(
            "a cut cannot be verified: the rounding of the weights alone changes the outputs "
            f"of the network in {_name(precision)} as much as a wrong cut would; let it run in "
            "float64, e.g. without .float() in its code"
        )


def _rounded(network: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose weights are one unit larger or smaller in their last place."""
    moved, generator = clone_module(network, {}), torch.Generator().manual_seed(seed)
    for tensor in moved.parameters():
        if tensor.is_floating_point():
            sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
            tensor.mul_(1 + sign.to(tensor.dtype) * torch.finfo(tensor.dtype).eps)
    return moved


def check_it_runs(narrow: nn.Module, example: Example, auxiliary: bool) -> None:
    """Run the narrow network on noise like ``example``; raises GammaslimError if that fails."""
    try:
        probe = Probe(example, auxiliary, snapshot_of_all(narrow))
        probe.outputs(partial(clone_to, narrow, "cpu"))
    except Exception as failure:  # user code may raise anything
        raise _not_running(failure) from failure


def _not_running(failure: Exception) -> GammaslimError:
    if is_out_of_memory(failure):
        return GammaslimError(f"there is not enough memory to verify the cut: {reason(failure)}")
    return WrongCutError(f"the narrow network does not run: {reason(failure)}")


def _training_error(
    network: nn.Module, example: Example, snapshot: Snapshot, backward: bool
) -> str | None:
    """Return why a training step fails on samples like ``example``; None if it succeeds."""
    try:
        if backward:
            _train_a_step(network, example)
        else:
            trace_with_snapshot(network, example, snapshot, training=True)
    except Exception as error:  # user code may raise anything
        return reason(error)
    return None


def _train_a_step(network: nn.Module, example: Example) -> None:
    """Run a copy forward and backward on the meta device, or on the CPU if that fails."""
    try:
        copy = clone_to(network, "meta")
        _backward(copy, map_tensors(noise_for(copy, example), lambda t: t.to("meta")))
    except Exception:  # meta tensors have no values, and some networks read values
        copy = clone_to(network, "cpu", precision_of(network)).cpu()
        _backward(copy, noise_for(copy, example))


def _backward(network: nn.Module, batch: Example) -> None:
    with preserve_state(network), training_mode(network, training=True), torch.enable_grad():
        outputs = [t for t in tensors_in(call_network(network, batch)) if t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def _masked(wide: nn.Module, layers: Layers, dtype: torch.dtype) -> nn.Module:
    """Return a copy on the CPU in which the weights for removed inputs are zero."""
    masked = clone_to(wide, "cpu", dtype).cpu()
    with torch.no_grad():
        for name, channels in layers.items():
            if channels.in_ is not None:
                _zero_inputs(masked, name, channels)
    return masked


def _zero_inputs(network: nn.Module, name: str, channels: LayerChannels) -> None:
    """Zero the weights of the layer or parameter ``name`` for removed inputs."""
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        weight = tensor_named(network, name)
        axis = inputs_axis(weight, channels.axis)
        return None if axis is None else _zero_columns(weight, channels, axis, 1)
    rule = layer_rule(layer)
    if is_depthwise(layer) or rule is None:
        return None  # a depthwise convolution does not sum over channels
    for attribute, sides in rule.tensors.items():
        weight = getattr(layer, attribute, None)
        if "in" in sides and weight is not None:
            _zero_columns(weight, channels, sides.index("in"), int(getattr(layer, "groups", 1)))
    return None


def _zero_columns(weight: torch.Tensor, channels: LayerChannels, axis: int, groups: int) -> None:
    if axis == 0:
        groups = 1  # all inputs are along this axis
    used = torch.zeros(weight.shape[axis] * groups, dtype=weight.dtype)
    used[list(channels.in_ or ())] = 1
    if groups > 1:
        rows = used.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
        weight.mul_(rows.view(*rows.shape, *[1] * (weight.dim() - 2)))
    else:
        weight.mul_(used.view(-1, *[1] * (weight.dim() - axis - 1)))
