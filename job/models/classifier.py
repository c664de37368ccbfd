"""Classifier of a network: the layer that computes the logits, found by running the network."""

from __future__ import annotations

import torch
from torch import nn

from job.console import counted
from job.errors import UsageError, reason
from job.models.input_size import TYPICAL_SIZES, copy_to_meta

# key prefixes of the auxiliary classifiers of torchvision's GoogLeNet and Inception v3
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def find_head(network: nn.Module) -> tuple[str | None, int]:
    """Return the name of the layer that computes the logits, and the number of logits.

    This is the last linear layer or 1x1 convolution to run that has as many outputs as there are
    logits. The name is None if there is no such layer. Raises UsageError if the network does not
    return logits (B, N).
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
    """Return the names of the output layers, with ``count`` outputs, of auxiliary classifiers."""
    return [
        name
        for name, layer in network.named_modules()
        if name.startswith(AUXILIARY) and _outputs(layer) == count
    ]


def replace_classifier(network: nn.Module, num_classes: int) -> str:
    """Replace the classifier of ``network`` unless it already returns ``num_classes`` logits.

    The weights of the new layer are drawn from torch's global generator. Returns a message that
    tells the user what was replaced, or "". Raises UsageError if no layer can be replaced.
    """
    name, count = find_head(network)
    if count == num_classes:
        return ""
    kind = type(network).__name__
    advice = "let the factory take num_classes"
    logits = f"{counted(count, 'logit')} for {counted(num_classes, 'class')}"
    if name is None:
        raise UsageError(
            f"{kind} returns {logits}, and has no final linear layer to replace: {advice}"
        )
    parent, _, leaf = name.rpartition(".")
    head = _with_outputs(network.get_submodule(name), num_classes)
    setattr(network.get_submodule(parent), leaf, head)
    if find_head(network)[1] != num_classes:
        raise UsageError(
            f"{kind} does not return {counted(num_classes, 'logit')} after its layer {name} is "
            f"replaced: {advice}"
        )
    return f"{kind} returns {logits}: its classifier, layer {name}, is replaced by a new one"


def _run(shadow: nn.Module) -> torch.Tensor:
    """Return the logits (2, N), on the meta device, for the first image size that works."""
    why = ""
    for size in TYPICAL_SIZES:
        try:
            with torch.no_grad():
                logits = shadow(torch.empty(2, 3, size, size, device="meta"))
        except Exception as error:  # user code may raise anything
            why = why or reason(error)
            continue
        if isinstance(logits, torch.Tensor) and logits.dim() == 2:
            return logits
        why = f"it returns {getattr(logits, 'shape', type(logits).__name__)}"
    kind = type(shadow).__name__
    raise UsageError(
        f"{kind} must take images (B, 3, H, W) and return logits (B, N): {why}. Networks of other "
        "tasks are trained and cut by gammaslim prune --task, with --weights, and in Python by "
        "gammaslim.slim"
    )


def _outputs(layer: nn.Module) -> int:
    """Return the number of outputs of a linear layer or 1x1 convolution; 0 for other layers."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.out_channels
    return 0


def _with_outputs(layer: nn.Module, outputs: int) -> nn.Module:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    bias, device, dtype = layer.bias is not None, weight.device, weight.dtype
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, bias, device, dtype)
    return nn.Conv2d(weight.shape[1], outputs, 1, bias=bias, device=device, dtype=dtype)
