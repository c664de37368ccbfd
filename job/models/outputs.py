"""Outputs of a network: its logits, and those of auxiliary classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

AUXILIARY_WEIGHT = 0.3  # of an auxiliary classifier's loss (Szegedy et al. 2014, section 5)
MAIN_OUTPUTS = ("logits", "out", "output", "prediction", "predictions")  # keys, by preference


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits (B, C): the output, its part named in MAIN_OUTPUTS, or its first part.

    Raises DataError for an output without logits.
    """
    return all_logits(output)[0]


def main_output(output: Any) -> Any:
    """Return the main tensor of an output: itself, its part named in MAIN_OUTPUTS, or the first.

    Anything else is returned as it is.
    """
    if isinstance(output, torch.Tensor):
        return output
    parts = [part for part in _parts(output) if isinstance(part, torch.Tensor)]
    return parts[0] if parts else output


def named_outputs(output: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of an output by name: keys, fields, or ``output_0`` and so on."""
    found: dict[str, torch.Tensor] = {}
    _add_outputs("", _with_keys(output), found)
    return found


def _add_outputs(name: str, value: Any, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name or "output"] = value
    elif isinstance(value, (Mapping, tuple, list)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in items:
            prefix = name or ("" if isinstance(value, Mapping) else "output")
            _add_outputs(f"{prefix}_{key}" if prefix else str(key), _with_keys(part), found)


def all_logits(output: Any) -> list[torch.Tensor]:
    """Return the logits (B, C), then those of auxiliary classifiers, of the same shape.

    Raises DataError for an output without logits.
    """
    parts = [output] if isinstance(output, torch.Tensor) else _parts(output)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if not tensors or tensors[0].dim() != 2:
        what = tuple(tensors[0].shape) if tensors else type(output).__name__
        raise DataError(f"the network returns {what}: logits of shape (images, classes) are needed")
    return [tensor for tensor in tensors if tensor.shape == tensors[0].shape]


def _parts(output: Any) -> list[Any]:
    """Return the parts of an output, the main one first."""
    output = _with_keys(output)
    if isinstance(output, Mapping):
        main = next((name for name in MAIN_OUTPUTS if name in output), None)
        return ([output[main]] if main else []) + [v for k, v in output.items() if k != main]
    return list(output) if isinstance(output, (tuple, list)) else []


def _with_keys(output: Any) -> Any:
    """Return the fields of a dataclass or a named tuple as a dict, anything else as it is."""
    if is_dataclass(output) and not isinstance(output, Mapping):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return output._asdict() if hasattr(output, "_asdict") else output


class Logits(nn.Module):
    """Network that returns a list: its logits, then those of its auxiliary classifiers.

    ``run`` maps inputs to the output of ``network`` with its parameters, e.g. compiled code.
    """

    def __init__(
        self, network: nn.Module, run: Callable[[torch.Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Map inputs (B, 3, S, S) to logits (B, C), then those of auxiliary classifiers."""
        return all_logits(self.run(inputs) if self.run else self.network(inputs))
