"""Weights that are all zero, e.g. of a head or of a BatchNorm that is initialised with zeros.

The outputs of a network do not depend on what is before them, so that equal outputs prove nothing
about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.slimming.surgery.clone import clone_module
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.planning.layer_channels import Layers


def fill_zero_weights(
    wide: nn.Module, narrow: nn.Module, layers: Layers
) -> tuple[nn.Module, nn.Module]:
    """Return copies of both networks with noise in place of weights that are all zero.

    Weights of the narrow network, cut by ``layers``, get the noise of the channels that are kept.
    Biases stay zero. Both networks are returned as they are if there are no such weights.
    """
    zero = [name for name, weight in wide.named_parameters() if _is_zero(name, weight)]
    if not zero:
        return wide, narrow
    filled, generator = clone_module(wide, {}), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in zero:
            weight = filled.get_parameter(name)
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / max(1, weight[0].numel()) ** 0.5)
        cut = dict(apply_plan(filled, layers).named_parameters())
        copy = clone_module(narrow, {})
        for name, weight in copy.named_parameters():
            if name in zero and name in cut and cut[name].shape == weight.shape:
                weight.copy_(cut[name])
    return filled, copy


def _is_zero(name: str, weight: nn.Parameter) -> bool:
    if name.rpartition(".")[2] == "bias" or not weight.is_floating_point() or not weight.dim():
        return False
    values = weight.detach()
    return bool(values.numel()) and not values.flatten()[:1].any() and not values.any()
