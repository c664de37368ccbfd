"""Layers of any width for timing: what a layer's time depends on, and modules of that shape."""

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
    """The type and options of a layer, and its input (B, …) with the channels left out.

    ``inputs`` and ``outputs`` are its numbers of channels. A layer with ``together`` has as many
    outputs as inputs: a BatchNorm or a depthwise convolution.
    """

    kind: str
    inputs: int
    outputs: int
    batch: int
    rest: tuple[int, ...]  # sizes of the input beyond batch and channels
    options: tuple[tuple[str, str], ...] = ()
    together: bool = False

    @property
    def key(self) -> str:
        """The shape as text, for a cache."""
        sizes = f"{self.kind} {self.inputs} {self.outputs} {self.batch} {self.rest}"
        return f"{sizes} {self.options}"


def shape_of(layer: nn.Module, size: Sequence[int]) -> LayerShape | None:
    """Return the shape of ``layer`` on inputs of ``size``; None for one that is not timed alone."""
    if isinstance(layer, BATCHNORM) and len(size) > 1:
        channels = int(layer.num_features)
        kind = type(layer).__name__
        return LayerShape(kind, channels, channels, size[0], tuple(size[2:]), together=True)
    if isinstance(layer, nn.Linear):
        rest = tuple(size[1:-1])
        bias = (("bias", str(layer.bias is not None)),)
        return LayerShape("Linear", layer.in_features, layer.out_features, size[0], rest, bias)
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
    """Return a call of a layer like ``layer`` with so many channels, on random inputs."""
    weight = next(layer.parameters(), torch.empty(0))
    narrow = _narrow_layer(layer, inputs, outputs).to(weight.device, weight.dtype).eval()
    size = [shape.batch, inputs, *shape.rest]
    if isinstance(layer, nn.Linear):
        size = [shape.batch, *shape.rest, inputs]
    images = random_images(size, weight.device, weight.dtype)
    if weight.dim() == 4 and not weight.is_contiguous():
        narrow.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    return eager(narrow, images)


def _narrow_layer(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """A layer with the options of ``layer``; its weights are cut from those of the layer."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if isinstance(layer, BATCHNORM):
            made: nn.Module = type(layer)(inputs)
        elif isinstance(layer, nn.Linear):
            made = nn.Linear(inputs, outputs, layer.bias is not None)
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            groups = inputs if layer.groups > 1 else 1
            made = type(layer)(
                inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
                groups, layer.bias is not None,
            )  # fmt: skip
    made.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if tensor.is_floating_point():
                own = layer.state_dict()[name].cpu()
                tensor.copy_(own[tuple(map(slice, tensor.shape))])
    return made
