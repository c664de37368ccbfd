"""A new optimizer for each round's network, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of ``optimizer`` as ``optimizer.{parameter number}.{name}`` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": value
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Load what ``optimizer_tensors`` gave, keys without their first part, laid out as needed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            # fused kernels walk both in memory order: the layout must be the parameter's
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    # torch places each value where its kernel reads it: a fused AdamW's step count on the GPU too
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
