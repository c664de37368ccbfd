"""Training for sparsity: a pull on the γ of BatchNorm, so that unneeded channels show themselves.

The pull is a step of its own after each optimizer step. So it does not depend on the optimizer
(Adam would rescale a subgradient), on loss scaling or on gradient accumulation, and every process
takes the same one without communication.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.training.optimizer import learning_rate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from job.config import PruneConfig

T = 1.2  # of polarize, as for ResNet-50 in the paper
# λ times the learning rate, summed: 1e-4 over 160 epochs of 782 steps from 0.1 on in the paper
REACH, WEAK = 0.66, 0.05
SMALL = 1e-2  # a γ below this part of the largest counts as small
BINS = 20


def gamma_layers(network: nn.Module) -> list[str]:
    """Names of the layers of ``network`` that have a γ: every affine BatchNorm."""
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine
    ]


def gammas_of(network: nn.Module, layers: Iterable[str]) -> list[torch.Tensor]:
    """γ (C,) of each of ``layers``: the parameters themselves."""
    return [network.get_submodule(name).get_parameter("weight") for name in layers]


@torch.no_grad()
def pull(kind: str, gammas: Sequence[torch.Tensor], strength: float) -> None:
    """Take one step of ``strength``, learning rate times λ, on all of ``gammas`` in place.

    ``kind`` is ``l1`` or ``polarize``. Nothing here waits for the device.
    """
    step = {"l1": shrunk, "polarize": polarized}[kind]
    if gammas:
        moved = step(torch.cat(list(gammas)), strength)
        torch._foreach_copy_(list(gammas), list(torch.split(moved, [len(g) for g in gammas])))


def shrunk(gamma: torch.Tensor, strength: float) -> torch.Tensor:
    """The proximal step of strength·‖γ‖₁: sign(γ)·max(|γ| - strength, 0), zeros exact.

    Liu et al. 2017, eq. 1, minimised by soft thresholds as in Ye et al. 2018 (ISTA).
    """
    return gamma.sign() * (gamma.abs() - strength).clamp_(min=0)


def polarized(gamma: torch.Tensor, strength: float) -> torch.Tensor:
    """A subgradient step on t·‖γ‖₁ - ‖γ - mean(γ)‖₁, then clipped to [0, 1].

    ``gamma`` (n,) holds all γ of the network: the mean is over them. Zhuang et al. 2020, eq. 2.
    """
    # float64: in float32 the mean of equal γ differs from them, and is another's on another device
    wide = gamma.double()
    side = (wide - wide.mean()).sign()
    slope = T * wide.sign() - side + side.mean()  # the last: each γ moves the mean
    return (wide - strength * slope).clamp_(0, 1).to(gamma.dtype)


def forecast(config: PruneConfig, epochs: int, steps: int) -> str:
    """What ``steps`` steps in ``epochs`` can do to γ, for the console."""
    rates = sum(learning_rate(config, step, steps) for step in range(steps))
    reach = config.sparsity_strength * rates  # l1 lowers no γ by more
    line = (
        f"sparsity: {config.sparsity} on γ for {epochs} epochs; "
        f"λ times the learning rate adds up to {reach:.3g}"
    )
    if reach >= WEAK:
        return line
    return (
        f"Warning: {line}, which hardly moves a γ of 1: the {REACH:g} of Liu et al. 2017 is "
        f"--sparsity-weight {REACH / rates:.2g} here"
    )


def gamma_numbers(gammas: Sequence[torch.Tensor]) -> dict[str, float]:
    """``gamma_mean``, of |γ|, and ``gamma_small``: the share below SMALL times the largest."""
    if not gammas:
        return {}
    size = torch.cat([g.detach().double().abs() for g in gammas])
    mean, small = torch.stack([size.mean(), (size < SMALL * size.max()).double().mean()]).tolist()
    return {"gamma_mean": mean, "gamma_small": small}


def gamma_histogram(gammas: Sequence[torch.Tensor]) -> dict[str, Any]:
    """How many |γ| there are, how many are exactly zero, and counts in BINS bins from 0 to ``max``.

    The largest is in the last bin.
    """
    size = torch.cat([g.detach().double().abs().cpu() for g in gammas] or [torch.zeros(0).double()])
    top = float(size.max()) if len(size) else 0.0
    place = (size / (top or 1.0) * BINS).long().clamp_(0, BINS - 1)
    counts = torch.bincount(place, minlength=BINS).tolist()
    zeros = int((size == 0).sum())
    return {"count": len(size), "zeros": zeros, "max": top, "bins": counts}
