"""Memory format of images: channels last, which is faster, where a network runs with it.

``x.view(len(x), -1)`` of a feature map, for example, works with channels first alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from job.slimming.graph.layers import BATCHNORM, INSTANCENORM
from job.slimming.graph.modes import training_mode
from job.slimming.graph.snapshot import preserve_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from job.slimming.calibration.batch import Batches, CalibrationBatch

FEW = 2  # images, on which every BatchNorm can train


class ImageFormat:
    """Converter of images to the memory format for ``network``, chosen with the first images."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.found: torch.memory_format | None = None

    def __call__(self, inputs: Any) -> Any:
        """Return ``inputs``, in another memory format if they are images (B, C, H, W)."""
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4 or not len(inputs):
            return inputs
        if self.found is None:
            last = runs_channels_last(self.network, inputs[:FEW])
            self.found = torch.channels_last if last else torch.contiguous_format
        return inputs.contiguous(memory_format=self.found)


def in_image_format(network: nn.Module, batches: Batches) -> Batches:
    """Return a function like ``batches``, of batches in the memory format for ``network``."""
    fitted = ImageFormat(network)

    def formatted() -> Iterator[CalibrationBatch]:
        for batch in batches():
            yield fitted(batch) if isinstance(batch, torch.Tensor) else (fitted(batch[0]), batch[1])

    return formatted


def set_memory_format(network: nn.Module, layout: torch.memory_format) -> None:
    """Store the weights (O, I, H, W) of ``network`` in a memory format, in place.

    ``network.to`` raises an error where it has weights of 3-d convolutions too.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=layout)  # the strides of gradients too


def runs_channels_last(network: nn.Module, images: torch.Tensor, *, training: bool = False) -> bool:
    """Return whether ``network`` runs on ``images`` (B, C, H, W) with channels last.

    Also True if the network fails with channels first too, which says nothing about the format.
    """
    if images.dim() != 4 or _runs(network, images, torch.channels_last, training):
        return True
    return not _runs(network, images, torch.contiguous_format, training)


def _runs(
    network: nn.Module, images: torch.Tensor, layout: torch.memory_format, training: bool
) -> bool:
    with _unchanged(network), training_mode(network, training=training), torch.no_grad():
        try:
            network(images.contiguous(memory_format=layout))
        except Exception:  # user code may raise anything
            return False
    return True


@contextmanager
def _unchanged(network: nn.Module) -> Iterator[None]:
    """Restore all state of ``network``, and the statistics that torch changes without a trace."""
    norms = [
        module for module in network.modules() if isinstance(module, (BATCHNORM, INSTANCENORM))
    ]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    with preserve_state(network):
        yield
    with torch.no_grad():
        for buffer, values in before:
            buffer.copy_(values)
