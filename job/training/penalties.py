"""Sparsity penalties on γ, each as a step on γ. ``PENALTIES`` is the table of penalties.

A new penalty is a function here, an entry in the table, and its name in ``SparsityName`` of
`job.config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from job.config import SparsityName

POLARIZE_T = 1.2  # the paper's value for ResNet-50


@dataclass(frozen=True)
class Penalty:
    """A sparsity penalty.

    ``step`` takes all γ of the network (n,) and a strength, the learning rate times λ, and returns
    the γ after one step on the penalty (n,). It does not wait for the device.
    """

    step: Callable[[torch.Tensor, float], torch.Tensor]
    help: str


def soft_threshold(gamma: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the proximal step of strength·‖γ‖₁: sign(γ)·max(|γ| - strength, 0), zeros exact.

    Liu et al. 2017, eq. 1, minimised by soft thresholds as in Ye et al. 2018 (ISTA).
    """
    return gamma.sign() * (gamma.abs() - strength).clamp_(min=0)


def polarize(gamma: torch.Tensor, strength: float) -> torch.Tensor:
    """Return γ after a subgradient step on t·‖γ‖₁ - ‖γ - mean(γ)‖₁, clipped to [0, 1].

    The mean is over all γ of the network. Zhuang et al. 2020, eq. 2.
    """
    # float64: in float32 the mean of equal γ differs from them, and differs between devices
    wide = gamma.double()
    side = (wide - wide.mean()).sign()
    slope = POLARIZE_T * wide.sign() - side + side.mean()  # the last term: each γ moves the mean
    return (wide - strength * slope).clamp_(0, 1).to(gamma.dtype)


PENALTIES: dict[SparsityName, Penalty] = {
    "l1": Penalty(soft_threshold, "λ‖γ‖₁, which moves every γ towards 0 (Liu et al. 2017)"),
    "polarize": Penalty(
        polarize, "separates small γ, which become 0, from large ones (Zhuang et al. 2020)"
    ),
}
