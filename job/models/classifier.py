"""The classifier of a network: the layer that gives the logits, found by running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.errors import UsageError, reason
from job.models.input_size import SIZES, copy_to_meta

if TYPE_CHECKING:
    from job.models.notes import Note

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # of torchvision's GoogLeNet and Inception v3


def find_head(network: nn.Module) -> tuple[str | None, int]:
    """The name of the layer that gives the logits, and how many there are.

    It is the last linear layer or 1x1 convolution run that has as many outputs as there are logits;
    None when there is no such layer. Raises UsageError for a network that gives no logits (B, N).
    """
    shadow = copy_to_meta(network).eval()
    ran: list[str] = []
    for name, layer in shadow.named_modules():
        if _outputs(layer):
            layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    logits = _logits(shadow)
    count = int(logits.shape[1])
    for name in reversed(ran):
        if _outputs(shadow.get_submodule(name)) == count:
            return name, count
    return None, count


def auxiliary_heads(network: nn.Module, count: int) -> list[str]:
    """The layers of auxiliary classifiers, which only training runs, with ``count`` outputs."""
    return [
        name
        for name, layer in network.named_modules()
        if name.startswith(AUXILIARY) and _outputs(layer) == count
    ]


def replace_classifier(network: nn.Module, num_classes: int, note: Note) -> nn.Module:
    """``network`` with ``num_classes`` logits: its classifier is replaced where it has others.

    The new layer draws its weights from torch's random state. Raises UsageError.
    """
    name, count = find_head(network)
    if count == num_classes:
        return network
    kind = type(network).__name__
    advice = "let the factory take num_classes"
    if name is None:
        raise UsageError(
            f"{kind} gives {count} logits for {num_classes} classes, and ends in no linear layer "
            f"that could be replaced: {advice}"
        )
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, _resized(network.get_submodule(name), num_classes))
    if find_head(network)[1] != num_classes:
        raise UsageError(f"{kind} does not give {num_classes} logits with another {name}: {advice}")
    note(
        f"{kind} gives {count} logits for {num_classes} classes: its classifier, layer {name}, is "
        "replaced by a fresh one"
    )
    return network


def _logits(shadow: nn.Module) -> torch.Tensor:
    why = ""
    for size in SIZES:
        try:
            with torch.no_grad():
                logits = shadow(torch.empty(2, 3, size, size, device="meta"))
        except Exception as error:  # anybody's network, which may raise anything
            why = why or reason(error)
            continue
        if isinstance(logits, torch.Tensor) and logits.dim() == 2:
            return logits
        why = f"it gives {getattr(logits, 'shape', type(logits).__name__)}"
    kind = type(shadow).__name__
    raise UsageError(f"{kind} must take images (B, 3, H, W) and give logits (B, N): {why}")


def _outputs(layer: nn.Module) -> int:
    """How many outputs a linear layer or a 1x1 convolution has; 0 for other layers."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.out_channels
    return 0


def _resized(layer: nn.Module, outputs: int) -> nn.Module:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    like: dict[str, Any] = {"bias": layer.bias is not None}
    like |= {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, **like)
    return nn.Conv2d(weight.shape[1], outputs, 1, **like)
