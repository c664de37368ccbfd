"""Convolutions across channels whose kept channels stay as far apart as they were.

An efficient channel attention (ECA, Wang et al. 2020) convolves the means of neighbouring channels.
In a narrow network the means of removed channels are zero, so that the others keep their places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from job.slimming.graph.layers import CONVOLUTIONS

# size and axis of the line of channels, then stride, padding, dilation and groups
Line = tuple[int, int, Any, Any, Any, int]
FUNCTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def spaced_convolution(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    indices: torch.Tensor,
    line: Line,
) -> torch.Tensor:
    """Convolve channels at ``indices`` (C,) of a line, with zeros at all other positions.

    ``image`` and the result have C values along the axis ``line[1]``, as in (B, 1, C).
    """
    tensors = (image, weight, indices)
    if has_torch_function(tensors):
        return handle_torch_function(
            spaced_convolution, tensors, image, weight, bias, indices, line
        )
    size, axis, *options = line
    shape = list(image.shape)
    shape[axis] = size
    spaced = image.new_zeros(shape).index_copy(axis, indices, image)
    outputs = FUNCTIONS[image.dim()](spaced, weight, bias, *options)
    return outputs.index_select(axis, indices)


class SpacedConvolution(nn.Module):
    """Replacement of a convolution along an axis that has the channels ``indices`` (C,) left.

    The axis ``line[1]`` had ``line[0]`` channels before the cut.
    """

    indices: torch.Tensor

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, indices: torch.Tensor, line: Line
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = weight.shape[1] * line[-1], weight.shape[0]
        self.line = line
        self.weight, self.bias = weight, bias
        self.register_buffer("indices", indices)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Convolve an activation with C values along the axis of channels."""
        return spaced_convolution(image, self.weight, self.bias, self.indices, self.line)


def line_of(layer: Any, size: int, axis: int) -> Line:
    """Return the line of a convolution along the ``size`` channels of ``axis``."""
    return (size, axis, layer.stride, layer.padding, layer.dilation, layer.groups)


def can_be_spaced(layer: Any, axis: int) -> bool:
    """Return whether a layer is a convolution with an output for each place of ``axis``."""
    if not isinstance(layer, CONVOLUTIONS) or "forward" in vars(layer):
        return False
    plain = any(type(layer).forward is kind.forward for kind in CONVOLUTIONS)
    return plain and layer.padding_mode == "zeros" and layer.stride[axis - 2] == 1
