"""Weights that are all zero, e.g. of a head or of a BatchNorm that is initialised with zeros.

The outputs of a network do not depend on the layers before such weights, so that equal outputs
prove nothing about these layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.slimming.surgery.clone import clone_module
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from job.slimming.planning.layer_channels import Layers


def fill_zero_weights(
    wide: nn.Module, narrow: nn.Module, layers: Layers
) -> tuple[nn.Module, nn.Module]:
    """Return both networks with noise in place of weights that are all zero.

    Weights of the narrow network, cut by ``layers``, get the noise of the channels that are kept.
    Biases stay zero. Other tensors are shared with the given networks. These are returned as they
    are if there are no such weights.
    """
    zero = {name: weight for name, weight in wide.named_parameters() if _is_zero(name, weight)}
    if not zero:
        return wide, narrow
    generator, noise = torch.Generator().manual_seed(0), {}
    for weight in zero.values():
        values = torch.randn(weight.shape, generator=generator)
        values /= max(1, weight[0].numel()) ** 0.5
        noise[id(weight)] = nn.Parameter(values.to(weight), requires_grad=False)
    outline = {id(t): t.detach().to("meta") for t in wide.buffers()}
    outline |= {id(t): nn.Parameter(t.detach().to("meta"), False) for t in wide.parameters()}
    cut = dict(apply_plan(clone_module(wide, outline | noise), layers).named_parameters())
    narrow_noise = {
        id(weight): cut[name]
        for name, weight in narrow.named_parameters()
        if name in zero and name in cut and cut[name].shape == weight.shape
    }
    filled = clone_module(wide, _shared(wide) | noise)
    return filled, clone_module(narrow, _shared(narrow) | narrow_noise)


def _shared(network: nn.Module) -> dict[int, Any]:
    return {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}


def _is_zero(name: str, weight: nn.Parameter) -> bool:
    if name.rpartition(".")[2] == "bias" or not weight.is_floating_point() or not weight.dim():
        return False
    values = weight.detach()
    return bool(values.numel()) and not values.flatten()[:1].any() and not values.any()
