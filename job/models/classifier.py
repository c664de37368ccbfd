"""The classifier of a network: the layer that computes the logits, found by running the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from job.console import counted
from job.errors import UsageError, reason
from job.models.input_size import TYPICAL_SIZES, copy_to_meta

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # of torchvision's GoogLeNet and Inception v3


def find_head(network: nn.Module) -> tuple[str | None, int]:
    """Find the layer that computes the logits; returns its name and the number of logits.

    It is the last linear layer or 1x1 convolution to run that has as many outputs as there are
    logits; the name is None when there is no such layer. Raises UsageError for a network that does
    not return logits (B, N).
    """
    shadow = copy_to_meta(network).eval()
    calls: list[str] = []
    for name, layer in shadow.named_modules():
        if _outputs(layer):
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    count = int(_run(shadow).shape[1])
    for name in reversed(calls):
        if _outputs(shadow.get_submodule(name)) == count:
            return name, count
    return None, count


def auxiliary_heads(network: nn.Module, count: int) -> list[str]:
    """The layers with ``count`` outputs of auxiliary classifiers, which run only in training."""
    return [
        name
        for name, layer in network.named_modules()
        if name.startswith(AUXILIARY) and _outputs(layer) == count
    ]


def replace_classifier(network: nn.Module, num_classes: int) -> str:
    """Give ``network`` a classifier of ``num_classes`` logits, unless it has as many.

    The new layer draws its weights from torch's random state. Returns a line that tells the user
    what was replaced, or "". Raises UsageError when no layer can be replaced.
    """
    name, count = find_head(network)
    if count == num_classes:
        return ""
    kind = type(network).__name__
    advice = "let the factory take num_classes"
    logits = f"{counted(count, 'logit')} for {counted(num_classes, 'class')}"
    if name is None:
        raise UsageError(
            f"{kind} returns {logits}, and ends in no linear layer that could be replaced: {advice}"
        )
    parent, _, leaf = name.rpartition(".")
    head = _with_outputs(network.get_submodule(name), num_classes)
    setattr(network.get_submodule(parent), leaf, head)
    if find_head(network)[1] != num_classes:
        raise UsageError(
            f"{kind} does not give {counted(num_classes, 'logit')} with another {name}: {advice}"
        )
    return f"{kind} returns {logits}: its classifier, layer {name}, is replaced by a new one"


def _run(shadow: nn.Module) -> torch.Tensor:
    """The logits (2, N) on the meta device, for the first size of images that fits."""
    why = ""
    for size in TYPICAL_SIZES:
        try:
            with torch.no_grad():
                logits = shadow(torch.empty(2, 3, size, size, device="meta"))
        except Exception as error:  # code of the user, which may raise anything
            why = why or reason(error)
            continue
        if isinstance(logits, torch.Tensor) and logits.dim() == 2:
            return logits
        why = f"it returns {getattr(logits, 'shape', type(logits).__name__)}"
    kind = type(shadow).__name__
    raise UsageError(f"{kind} must take images (B, 3, H, W) and give logits (B, N): {why}")


def _outputs(layer: nn.Module) -> int:
    """The number of outputs of a linear layer or a 1x1 convolution; 0 for other layers."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.out_channels
    return 0


def _with_outputs(layer: nn.Module, outputs: int) -> nn.Module:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    options: dict[str, Any] = {"bias": layer.bias is not None}
    options |= {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, **options)
    return nn.Conv2d(weight.shape[1], outputs, 1, **options)
