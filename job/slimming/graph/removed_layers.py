"""Replacements of layers that have no inputs or no outputs after a cut.

Torch has no convolution without output channels, and one without input channels gives the wrong
shape. ``NoOutput`` and ``ConstantOutput`` return what such layers would. Each calls one function
that a trace shows as one op, as it shows the functions of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from job.slimming.graph.layers import CONVOLUTIONS

# (stride, reach) for each axis after the channels: an axis of N values becomes one of
# (N - reach) // stride + 1. Without an entry an axis stays; None: channels are the last axis.
Geometry = tuple[tuple[int, int], ...] | None


def no_output(image: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Return an activation of no channels: (B, C, …) -> (B, 0, …), or (…, C) -> (…, 0)."""
    if has_torch_function((image,)):
        return handle_torch_function(no_output, (image,), image, geometry)
    return image.new_empty(_output_shape(image, geometry, 0))


def constant_output(image: torch.Tensor, geometry: Geometry, bias: torch.Tensor) -> torch.Tensor:
    """Return ``bias`` (O,) at every position: (B, C, …) -> (B, O, …), or (…, C) -> (…, O)."""
    if has_torch_function((image, bias)):
        return handle_torch_function(constant_output, (image, bias), image, geometry, bias)
    shape = _output_shape(image, geometry, bias.shape[0])
    values = bias.to(image.dtype)
    if geometry is not None:
        values = values.view(-1, *[1] * (image.dim() - 2))
    return values.expand(shape).contiguous()  # later ops may work in place


def _output_shape(image: torch.Tensor, geometry: Geometry, channels: int) -> list[int]:
    if geometry is None:
        return [*image.shape[:-1], channels]
    sizes = list(image.shape[2:])
    for axis, (stride, reach) in enumerate(geometry):
        sizes[axis] = (sizes[axis] - reach) // stride + 1
    return [image.shape[0], channels, *sizes]


class NoOutput(nn.Module):
    """Replacement of a layer without outputs."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return an activation of no channels."""
        return no_output(image, self.geometry)


class ConstantOutput(nn.Module):
    """Replacement of a layer without inputs, whose outputs are its ``bias`` (O,)."""

    def __init__(self, geometry: Geometry, bias: nn.Parameter) -> None:
        super().__init__()
        self.geometry = geometry
        self.out_channels = len(bias)
        self.bias = bias

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the bias at every position."""
        return constant_output(image, self.geometry, self.bias)


def geometry_of(layer: Any) -> Geometry:
    """Return how a convolution, linear layer, or one of the layers above changes shapes."""
    if isinstance(layer, (NoOutput, ConstantOutput)):
        return layer.geometry
    if not isinstance(layer, CONVOLUTIONS):
        return None
    padding = layer._reversed_padding_repeated_twice[::-1]  # both ends of each axis
    return tuple(
        (stride, dilation * (kernel - 1) + 1 - padding[2 * axis] - padding[2 * axis + 1])
        for axis, (stride, dilation, kernel) in enumerate(
            zip(layer.stride, layer.dilation, layer.kernel_size, strict=True)
        )
    )


def can_be_replaced(layer: nn.Module) -> bool:
    """Return whether a layer runs the forward pass of torch.nn, whose shapes are known."""
    if isinstance(layer, ConstantOutput):
        return True
    kinds = (*CONVOLUTIONS, nn.Linear)
    return "forward" not in vars(layer) and any(type(layer).forward is k.forward for k in kinds)
