"""What a network returns: the logits to learn from, and those of auxiliary classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from job.errors import DataError

AUXILIARY_WEIGHT = 0.3  # weight of an auxiliary classifier's loss: Szegedy et al. 2014, section 5
MAIN = ("logits", "out", "output", "prediction", "predictions")


def logits_of(output: Any) -> torch.Tensor:
    """The logits (B, C): the output itself, the one called so, or the first of several.

    Raises DataError for an output that has none.
    """
    return all_logits(output)[0]


def all_logits(output: Any) -> list[torch.Tensor]:
    """The logits (B, C), then those of the same shape, which auxiliary classifiers give."""
    if isinstance(output, torch.Tensor):
        found = [output]
    else:
        found = [value for value in _values(output) if isinstance(value, torch.Tensor)]
    if not found or found[0].dim() != 2:
        told = tuple(found[0].shape) if found else type(output).__name__
        raise DataError(f"the network gives {told}: logits of shape (images, classes) are needed")
    return [value for value in found if value.shape == found[0].shape]


def _values(output: Any) -> list[Any]:
    """The parts of an output, the main one first."""
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    elif hasattr(output, "_asdict"):
        output = output._asdict()
    if isinstance(output, Mapping):
        main = next((name for name in MAIN if name in output), None)
        return ([output[main]] if main else []) + [v for k, v in output.items() if k != main]
    return list(output) if isinstance(output, (tuple, list)) else []


class Logits(nn.Module):
    """A network that returns its logits and those of its auxiliary classifiers, nothing else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """inputs (B, 3, S, S) -> logits (B, C), then those of auxiliary classifiers."""
        return all_logits(self.network(inputs))
