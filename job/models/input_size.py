"""The sizes of images that a network takes, found by running it on torch's meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from job.errors import UsageError, reason
from job.models.outputs import logits_of

MAX_SIZE = 4096  # pixels: one input of this size takes StudentNet about a GiB
TYPICAL_SIZES = (32, 64, 96, 128, 224, 256, 299)  # pixels: those that networks are made for


def check_size(network: nn.Module, size: int, *, trained: bool = True) -> None:
    """Raise UsageError unless ``network`` takes images (B, 3, size, size).

    Nothing is computed: shapes are propagated for a batch of two, in evaluation mode and, if
    ``trained``, in training mode.
    """
    check_memory(size)
    shadow = copy_to_meta(network)
    modes = (False, True) if trained else (False,)
    why = find_misfit(shadow, size, modes)
    if why is None:
        return
    kind = type(network).__name__
    fits = [other for other in TYPICAL_SIZES if find_misfit(shadow, other, modes) is None]
    if not fits:
        raise UsageError(f"{kind} cannot be run on images of {size} pixels: {why}")
    small = size < fits[0]
    problem = f"is too small for {kind}" if small else f"does not fit {kind} ({why})"
    raise UsageError(f"--image-size {size} {problem}: {fits[0]} pixels do")


def check_memory(size: int) -> None:
    """Raise UsageError when images of ``size`` pixels are too large for any memory."""
    if size > MAX_SIZE:
        raise UsageError(f"--image-size {size} is too large: at most {MAX_SIZE}")


def copy_to_meta(network: nn.Module) -> nn.Module:
    """Copy a network to the meta device: shapes without values, in no memory."""
    shapes: dict[int, Any] = {id(b): b.detach().to("meta") for b in network.buffers()}
    for parameter in network.parameters():
        shapes[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    shadow = copy.deepcopy(network, shapes)
    for layer in shadow.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is None:
            layer.momentum = 0.0  # a cumulative average reads a value, and meta has none
    return shadow


def find_misfit(shadow: nn.Module, size: int, modes: tuple[bool, ...]) -> str | None:
    """Why a network on the meta device does not take images of ``size`` pixels, or None.

    ``modes`` are those to try, True for training.
    """
    images = torch.empty(2, 3, size, size, device="meta")
    for training in modes:
        try:
            with torch.no_grad():
                logits = shadow.train(training)(images)
                if training:  # auxiliary classifiers may return theirs too
                    logits = logits_of(logits)
        except Exception as error:  # code of the user, which may raise anything
            return reason(error)
        if not isinstance(logits, torch.Tensor):
            return f"it returns a {type(logits).__name__}, not a tensor of logits"
        if logits.dim() != 2:
            return f"it returns {tuple(logits.shape)}, not one row of logits an image"
    return None
