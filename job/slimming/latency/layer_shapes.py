"""Shapes of layers, on which their times depend, and layers of any width to time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.slimming.graph.layers import BATCHNORM
from job.slimming.latency.profile import random_images
from job.slimming.latency.runtimes import eager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class LayerShape:
    """Type and options of a layer, and the size of its input (B, …).

    ``inputs`` and ``outputs`` are its numbers of channels. A ``channelwise`` layer, which is a
    BatchNorm or a depthwise convolution, has as many outputs as inputs.
    """

    kind: str
    inputs: int
    outputs: int
    batch: int
    other_sizes: tuple[int, ...]  # of the input, without batch and channels
    options: tuple[tuple[str, str], ...] = ()
    channelwise: bool = False

    @property
    def key(self) -> str:
        """Key of the shape in a cache, as text."""
        sizes = f"{self.kind} {self.inputs} {self.outputs} {self.batch} {self.other_sizes}"
        return f"{sizes} {self.options}"


def shape_of(layer: nn.Module, size: Sequence[int]) -> LayerShape | None:
    """Return the shape of ``layer`` on inputs of ``size``; None for one that is not timed alone."""
    if isinstance(layer, BATCHNORM) and len(size) > 1:
        channels = int(layer.num_features)
        kind = type(layer).__name__
        return LayerShape(kind, channels, channels, size[0], tuple(size[2:]), channelwise=True)
    if isinstance(layer, nn.Linear):
        other_sizes = tuple(size[1:-1])
        bias = (("bias", str(layer.bias is not None)),)
        return LayerShape(
            "Linear", layer.in_features, layer.out_features, size[0], other_sizes, bias
        )
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer.padding_mode != "zeros":
        return None
    depthwise = layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1
    if layer.groups > 1 and not depthwise:
        return None
    names = ("kernel_size", "stride", "padding", "dilation")
    options = (
        *((name, str(getattr(layer, name))) for name in names),
        ("bias", str(layer.bias is not None)),
    )
    return LayerShape(
        type(layer).__name__, layer.in_channels, layer.out_channels, size[0], tuple(size[2:]),
        options, depthwise,
    )  # fmt: skip


def narrow_call(
    layer: nn.Module, shape: LayerShape, inputs: int, outputs: int
) -> Callable[[], object]:
    """Return a call, on random inputs, of ``layer`` with ``inputs`` and ``outputs`` channels."""
    weight = next(layer.parameters(), torch.empty(0))
    narrow = _narrow_layer(layer, inputs, outputs).to(weight.device, weight.dtype).eval()
    size = [shape.batch, inputs, *shape.other_sizes]
    if isinstance(layer, nn.Linear):
        size = [shape.batch, *shape.other_sizes, inputs]
    images = random_images(size, weight.device, weight.dtype)
    if weight.dim() == 4 and not weight.is_contiguous():
        narrow.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    return eager(narrow, images)


def _narrow_layer(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """Return a layer with the options of ``layer`` and its first weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if isinstance(layer, BATCHNORM):
            narrow: nn.Module = type(layer)(inputs)
        elif isinstance(layer, nn.Linear):
            narrow = nn.Linear(inputs, outputs, layer.bias is not None)
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            groups = inputs if layer.groups > 1 else 1
            narrow = type(layer)(
                inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
                groups, layer.bias is not None,
            )  # fmt: skip
    narrow.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in narrow.state_dict().items():
            if tensor.is_floating_point():
                weights = layer.state_dict()[name].cpu()
                tensor.copy_(weights[tuple(map(slice, tensor.shape))])
    return narrow
