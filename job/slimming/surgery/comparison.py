"""Difference of the outputs of two networks, and reasons why outputs cannot be compared."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from job.errors import DataError, UsageError
from job.slimming.graph.layer_rules import is_layer
from job.slimming.graph.layers import modules_of
from job.slimming.graph.modes import training_mode
from job.slimming.graph.trace import trace_network
from job.slimming.inputs import call_network, tensors_in
from job.slimming.surgery.constant_noise import ConstantNoise
from job.slimming.surgery.double_precision import DoublePrecision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from job.slimming.inputs import Example

RANDOM = frozenset(  # without those that are replaced by constants
    "randint randint_like randperm random_ multinomial poisson binomial geometric_ rrelu".split()
)


def relative_difference(
    outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> float:
    """Return the largest difference of two networks' outputs, relative to their largest values.

    The result is infinite if shapes, integers, booleans, or non-finite values differ, or if no
    value is finite.
    """
    if len(outputs) != len(reference) or not any(
        bool(tensor.isfinite().any()) for tensor in reference
    ):
        return math.inf
    return max(map(_difference, outputs, reference))


def _difference(outputs: torch.Tensor, reference: torch.Tensor) -> float:
    if outputs.shape != reference.shape or outputs.dtype != reference.dtype:
        return math.inf
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(outputs, reference) else math.inf
    finite = reference.isfinite()
    if not bool(finite.all()):
        if not torch.equal(finite, outputs.isfinite()) or not torch.equal(
            outputs[~finite].nan_to_num(), reference[~finite].nan_to_num()
        ):
            return math.inf
        outputs, reference = outputs[finite], reference[finite]
    if not reference.numel():
        return 0.0
    worst, largest = float((outputs - reference).abs().max()), float(reference.abs().max())
    if worst == 0:
        return 0.0
    return worst / largest if largest and math.isfinite(worst) else math.inf


def check_comparable(network: nn.Module, noise: Example, widened: bool = False) -> None:
    """Raise an error if the outputs of ``network`` on ``noise`` cannot prove a cut.

    If ``widened``, all is computed in float64. Raises DataError for damaged weights, and UsageError
    for a network whose outputs are not finite or differ between two passes.
    """
    check_finite_weights(network)
    wide = DoublePrecision if widened else nullcontext
    with wide():
        outputs = _pass(network, noise, seed=0)
        again = _pass(network, noise, seed=1)
    if not any(bool(tensor.isfinite().any()) for tensor in outputs):
        raise UsageError(
            "the network returns no finite number for noise in [0, 1), so that a cut cannot be "
            "verified: look for a division by zero, or a root or logarithm of negative values"
            if any(tensor.numel() for tensor in outputs)
            else "the network returns no tensor with values, so that a cut cannot be verified; if "
            "it answers with boxes, call slim in Python with forward=, a function that returns "
            "what its layers compute"
        )
    if relative_difference(again, outputs) > 0:
        raise UsageError(
            "the network's outputs in eval mode differ from pass to pass, so that a cut cannot be "
            f"verified: {_culprit(network, noise)}"
        )


def check_finite_weights(network: nn.Module) -> None:
    """Raise DataError if a weight of a layer, or a BatchNorm statistic, is not finite."""
    for name, module in modules_of(network, once=True).items():
        if not is_layer(module):  # other modules may have a mask of -inf
            continue
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or _is_finite(tensor.detach()):
                continue
            kind = "NaN" if bool(tensor.detach().isnan().any()) else "infinity"
            raise DataError(f"{name}.{attribute} of the network contains {kind}: damaged weights")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite; their sum, which is faster, may overflow."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _pass(network: nn.Module, noise: Example, seed: int) -> list[torch.Tensor]:
    eval_mode = training_mode(network, training=False)
    with eval_mode, torch.no_grad(), torch.random.fork_rng(), ConstantNoise():
        torch.manual_seed(seed)
        return [tensor.detach().clone() for tensor in tensors_in(call_network(network, noise))]


def _culprit(network: nn.Module, noise: Example) -> str:
    names = sorted({op.name for op in trace_network(network, noise).ops} & RANDOM)
    if names:
        return f"its forward pass calls {', '.join(names)}; turn that off for the cut"
    return "its forward pass keeps a state, or uses random numbers; turn that off for the cut"
