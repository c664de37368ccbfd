"""Copies of a network's tensors, and of its inputs, for a trace on another device."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.slimming.graph.layers import tensors_of
from job.slimming.inputs import map_tensors, repeat_first_sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.slimming.graph.snapshot import TensorPlace
    from job.slimming.inputs import Example


@contextmanager
def replaced(places: list[TensorPlace], copies: dict[int, torch.Tensor]) -> Iterator[None]:
    """Replace tensors by their copies within the context."""
    try:
        for store, key, tensor in places:
            store[key] = copies[id(tensor)]
        yield
    finally:
        for store, key, tensor in places:
            with suppress(LookupError):
                if store[key] is copies[id(tensor)]:
                    store[key] = tensor


def batch_on(network: nn.Module, example: Example, device: str | None, count: int) -> Example:
    """Return ``count`` samples like those of ``example``, without values if ``device`` is set."""
    batch: Example = repeat_first_sample(example, count)
    if device:
        empty: Example = map_tensors(batch, lambda t: torch.empty_like(t, device=device))
        return empty
    weight = next(network.parameters(), torch.empty(0))
    random: Example = map_tensors(  # an example may be on meta, without values
        batch, lambda t: torch.rand_like(t, device=weight.device) if t.is_meta else t
    )
    return random


def copy_tensors(
    network: nn.Module, places: list[TensorPlace], device: str | None
) -> dict[int, torch.Tensor]:
    """Return copies of the tensors in ``places``, by id of the original."""
    registered = {id(tensor) for *_, tensor in tensors_of(network)}
    copies: dict[int, torch.Tensor] = {}
    for _, _, tensor in places:
        if id(tensor) not in copies:
            # integers that are not buffers may be indices, whose values matter
            values = id(tensor) not in registered and not tensor.is_floating_point()
            copies[id(tensor)] = (
                torch.empty_like(tensor, device=device)
                if device and not values
                else tensor.detach().clone()
            )
    return copies
