"""The wide network of a cut, whose layers see zeros for the channels that the cut removes.

Written with forward hooks and float64 copies alone, to check the proof of the project.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import job
from job.slimming.inputs import tensors_in

if TYPE_CHECKING:
    from job.slimming.planning.layer_channels import Layers


def outputs64(network: nn.Module, example: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of a copy in float64."""
    twin = copy.deepcopy(network).double().eval()
    values = example.double() if example.is_floating_point() else example
    with torch.no_grad():
        return list(tensors_in(twin(values)))


def masked_network(network: nn.Module, layers: Layers) -> nn.Module:
    """A copy whose layers that sum over channels see zeros for those that are removed."""
    wide = copy.deepcopy(network)
    modules = dict(wide.named_modules())
    for name, channels in layers.items():
        module, across = modules.get(name), channels.line is not None
        inputs = channels.places if across else channels.in_
        if module is None and channels.in_ is not None:
            owner, _, attribute = name.rpartition(".")
            _zero_rows(getattr(wide.get_submodule(owner), attribute), channels.axis, channels.in_)
        if module is None or inputs is None or _is_depthwise(module):
            continue

        def hook(layer: Any, args: Any, kept: Any = inputs, axis: Any = channels.axis) -> Any:
            values = args[0]
            if axis is None:
                axis = 1 if hasattr(layer, "kernel_size") else values.dim() - 1
            mask = torch.zeros(values.shape[axis], dtype=values.dtype)
            mask[list(kept)] = 1
            mask = mask.view([-1 if a == axis else 1 for a in range(values.dim())])
            return values * mask, *args[1:]

        module.register_forward_pre_hook(hook)
    return wide


def _zero_rows(matrix: torch.Tensor, axis: int | None, kept: tuple[int, ...]) -> None:
    """Zero a parameter of no layer for the inputs that are removed, beside its outputs' axis."""
    inputs = matrix if axis == 1 else matrix.mT
    if matrix.dim() == 2:
        gone = torch.ones(len(inputs), dtype=torch.bool)
        gone[list(kept)] = False
        inputs.data[gone] = 0


class KeptNorm(nn.Module):
    """A norm over channels that is computed from the channels ``kept``; zeros elsewhere."""

    def __init__(self, norm: Any, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.norm, self.kept = norm, list(kept)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, kept = self.norm, self.kept
        first = isinstance(norm, (nn.GroupNorm, nn.LocalResponseNorm)) or x.shape[1] > max(kept)
        axis = 1 if isinstance(norm, nn.GroupNorm) or (first and x.dim() == 4) else x.dim() - 1
        axis = 1 if len(getattr(norm, "normalized_shape", ())) == 3 else axis  # (C, 1, 1)
        values = x.movedim(axis, -1)[..., kept]
        if isinstance(norm, nn.GroupNorm):
            size = norm.num_channels // norm.num_groups
            groups = len({index // size for index in kept})
            flat = values.movedim(-1, 1).reshape(len(x), groups, -1)
            variance, mean = torch.var_mean(flat, 2, correction=0, keepdim=True)
            flat = (flat - mean) / (variance + norm.eps).sqrt()
            values = flat.reshape(values.movedim(-1, 1).shape).movedim(1, -1)
        elif isinstance(norm, nn.RMSNorm):
            values = values / (values.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        else:
            variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
            values = (values - mean) / (variance + norm.eps).sqrt()
        if norm.weight is not None:
            values = values * norm.weight[kept].flatten()
        if getattr(norm, "bias", None) is not None:
            values = values + norm.bias[kept].flatten()
        full = torch.zeros_like(x).movedim(axis, -1)
        full[..., kept] = values
        return full.movedim(-1, axis)


def with_kept_norms(network: nn.Module, layers: Layers) -> nn.Module:
    """A copy whose norms over channels are computed from the channels that are kept."""
    wide = copy.deepcopy(network)
    for name, channels in layers.items():
        norm = dict(wide.named_modules()).get(name)
        if isinstance(norm, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
            assert channels.out is not None
            wide.set_submodule(name, KeptNorm(norm, channels.out))
    return wide


def _is_depthwise(module: Any) -> bool:
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == module.in_channels


def assert_equal_to_masked(
    wide: nn.Module, narrow: nn.Module, layers: Layers, example: torch.Tensor
) -> None:
    """The narrow network computes what the wide one does without the removed channels."""
    masked = outputs64(masked_network(with_kept_norms(wide, layers), layers), example)
    for ours, expected in zip(outputs64(narrow, example), masked, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def halve(network: nn.Module, example: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """Cut every group to half, check the proof by other means, and train a step."""
    options = {"policy": "uniform", "target": "width=0.5", "importance": "l2"} | options
    narrow, plan = job.slim(network, example, **options)
    assert plan.proof.error <= 1e-9
    assert_equal_to_masked(network, narrow, plan.layers, example)
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    outputs = narrow.train()(torch.cat([example, example]) if len(example) == 1 else example)
    outputs.square().mean().backward()
    for name, parameter in narrow.named_parameters():
        assert parameter.grad is not None, name
    narrow.eval()
    return narrow, plan


def assert_compensated(network: nn.Module, example: torch.Tensor, images: torch.Tensor) -> None:
    """The defaults, calibrated on ``images``, lose less than half of what a cut by γ loses."""
    ways = {"calibration": [images]}, {"importance": "gamma", "compensate": "none"}
    cuts = [job.slim(network, example, target="macs=0.6", **options)[0] for options in ways]
    with torch.no_grad():
        wide = network(images)
        losses = [(narrow(images) - wide).square().mean() for narrow in cuts]
    assert losses[0] < 0.5 * losses[1]
