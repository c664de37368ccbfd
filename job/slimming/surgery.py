"""Cut channels for real: dense, smaller layers, no masks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.errors import GammaslimError

if TYPE_CHECKING:
    from job.slimming.plan import LayerChannels, Layers


def narrowed(network: nn.Module, layers: Layers) -> nn.Module:
    """A copy of ``network`` with only the channels in ``layers``; the input is left untouched.

    Device, dtype, memory format, training mode and requires_grad stay as they are.
    """
    narrow = copy.deepcopy(network)
    for name, kept in layers.items():
        _cut(narrow.get_submodule(name), kept)
    return narrow


def _cut(layer: nn.Module, kept: LayerChannels) -> None:
    if isinstance(layer, nn.Conv2d):
        depthwise = layer.groups > 1
        _select(layer, "weight", kept.out, 0)
        _select(layer, "bias", kept.out, 0)
        if depthwise:
            if layer.groups != layer.in_channels or layer.groups != layer.out_channels:
                raise GammaslimError(f"cannot cut a convolution of {layer.groups} groups")
            layer.groups = len(layer.weight)
        else:
            _select(layer, "weight", kept.in_, 1)
        layer.out_channels = layer.weight.shape[0]
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.BatchNorm2d):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(layer, name, kept.out, 0)
        layer.num_features = len(layer.weight)
    else:
        raise GammaslimError(f"cannot cut a {type(layer).__name__}")


def _select(layer: nn.Module, name: str, kept: tuple[int, ...] | None, dim: int) -> None:
    tensor: torch.Tensor | None = getattr(layer, name)
    if tensor is None or kept is None:
        return
    index = torch.tensor(kept, dtype=torch.long, device=tensor.device)
    narrow = tensor.detach().index_select(dim, index)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        narrow = narrow.contiguous(memory_format=torch.channels_last)
    if isinstance(tensor, nn.Parameter):
        setattr(layer, name, nn.Parameter(narrow, tensor.requires_grad))
    else:
        setattr(layer, name, narrow)
