"""Image sizes that a network accepts, found by running it on torch's meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from job.errors import UsageError, reason
from job.models.outputs import logits_of

InputSize = int | tuple[int, ...]  # side of an RGB image in pixels, or the shape of one input
MAX_SIZE = 4096  # pixels: StudentNet needs about 1 GiB for one image of this size
TYPICAL_SIZES = (32, 64, 96, 128, 224, 256, 299)  # pixels


def input_shape(size: InputSize) -> tuple[int, ...]:
    """Return the shape of one input: (3, size, size) for the side of an image in pixels."""
    return (3, size, size) if isinstance(size, int) else size


def check_size(
    network: nn.Module, size: InputSize, *, trained: bool = True, classifier: bool = True
) -> None:
    """Raise UsageError unless ``network`` accepts inputs of ``size``, and a classifier has logits.

    Shapes are propagated for a batch of two, without computing values, in eval mode and, if
    ``trained``, in train mode.
    """
    if isinstance(size, int):
        check_memory(size)
    shadow = copy_to_meta(network)
    modes = (False, True) if trained else (False,)
    why = find_misfit(shadow, size, modes, classifier=classifier)
    if why is None:
        return
    kind = type(network).__name__
    if not isinstance(size, int):
        raise UsageError(f"{kind} cannot be run on inputs of {input_shape(size)}: {why}")
    fits = [
        other
        for other in TYPICAL_SIZES
        if find_misfit(shadow, other, modes, classifier=classifier) is None
    ]
    if not fits:
        raise UsageError(f"{kind} cannot be run on images of {size} pixels: {why}")
    small = size < fits[0]
    problem = f"is too small for {kind}" if small else f"does not fit {kind} ({why})"
    raise UsageError(f"--image-size {size} {problem}; {fits[0]} pixels fit")


def check_memory(size: int) -> None:
    """Raise UsageError if images of ``size`` pixels would need too much memory."""
    if size > MAX_SIZE:
        raise UsageError(f"--image-size {size} is too large: at most {MAX_SIZE}")


def copy_to_meta(network: nn.Module) -> nn.Module:
    """Copy a network to the meta device, where tensors have shapes but no values or storage."""
    shapes: dict[int, Any] = {id(b): b.detach().to("meta") for b in network.buffers()}
    for parameter in network.parameters():
        shapes[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    shadow = copy.deepcopy(network, shapes)
    for layer in shadow.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is None:
            layer.momentum = 0.0  # a cumulative average reads a value, which meta tensors lack
    return shadow


def find_misfit(
    shadow: nn.Module, size: InputSize, modes: tuple[bool, ...], *, classifier: bool = True
) -> str | None:
    """Return why a network on the meta device rejects inputs of ``size``, or None.

    ``modes`` are the modes to try: False for eval mode, True for train mode. A ``classifier`` must
    return logits.
    """
    images = torch.empty(2, *input_shape(size), device="meta")
    for training in modes:
        try:
            with torch.no_grad():
                logits = shadow.train(training)(images)
                if training and classifier:  # auxiliary classifiers may return logits as well
                    logits = logits_of(logits)
        except Exception as error:  # user code may raise anything
            return reason(error)
        if not classifier:
            continue
        if not isinstance(logits, torch.Tensor):
            return f"it returns a {type(logits).__name__}, not a tensor of logits"
        if logits.dim() != 2:
            return f"it returns {tuple(logits.shape)}, not one row of logits per image"
    return None
