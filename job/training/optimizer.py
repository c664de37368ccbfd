"""A new optimizer for each round's network, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from job.config import PruneConfig


def new_optimizer(network: nn.Module, config: PruneConfig, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9, over the parameters of ``network`` as it is now.

    Never keep one across a cut: it would go on updating the wide network's tensors. γ and biases
    (every parameter of one dimension) get no weight decay.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, config.lr, fused=fused)


def learning_rate(config: PruneConfig, step: int, steps: int) -> float:
    """The rate of ``step`` out of a round's ``steps``.

    ``constant``; ``cosine`` down to 0 (Loshchilov & Hutter 2017); ``step``: a tenth from half the
    round on, a hundredth from three quarters (Liu et al. 2017).
    """
    done = step / max(1, steps)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        return config.lr * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
    return config.lr
