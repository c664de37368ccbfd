"""The position within a round that training can resume from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Position:
    """A point within a round: the next batch of an epoch, and what the rest depends on.

    ``values`` holds what JSON can hold, ``tensors`` the named tensors.
    """

    round: int
    epoch: int
    batch: int
    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        """Name of the checkpoint folder: names sort as positions do."""
        return f"{self.round:03d}-{self.epoch:04d}-{self.batch:07d}"
