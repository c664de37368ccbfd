"""Sparse training: a penalty on γ shrinks the scales of channels that the network does not need.

The penalty is a separate step after each optimizer step. It does not depend on the optimizer (Adam
would rescale a subgradient), on loss scaling or on gradient accumulation. Every process takes the
same step without communication.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.console import counted
from job.training.penalties import PENALTIES
from job.training.schedule import learning_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.config import PruneConfig, SparsityName

# sum of λ times the learning rate; in the paper: λ = 1e-4, 160 epochs of 782 steps, from lr 0.1
PAPER_STRENGTH, WEAK_STRENGTH = 0.66, 0.05


@torch.no_grad()
def apply_penalty(name: SparsityName, gammas: Sequence[torch.Tensor], strength: float) -> None:
    """Take one step of ``strength``, the learning rate times λ, on all of ``gammas`` in place.

    Does not wait for the device.
    """
    if gammas:
        moved = PENALTIES[name].step(torch.cat(list(gammas)), strength)
        torch._foreach_copy_(list(gammas), list(torch.split(moved, [len(g) for g in gammas])))


def describe_sparsity(config: PruneConfig, epochs: int, steps: int) -> str:
    """Return a console line on how far ``steps`` steps in ``epochs`` epochs can move γ."""
    rates = sum(learning_rate(config, step, steps) for step in range(steps))
    strength = config.sparsity_strength * rates  # the most that l1 lowers a γ
    line = (
        f"sparsity: {config.sparsity} on γ for {counted(epochs, 'epoch')}; "
        f"λ times the learning rate adds up to {strength:.3g}"
    )
    if strength >= WEAK_STRENGTH:
        return line
    return (
        f"Warning: {line}, which hardly moves a γ of 1: the {PAPER_STRENGTH:g} of Liu et al. 2017 "
        f"is --sparsity-weight {PAPER_STRENGTH / rates:.2g} here"
    )
