"""The optimizer of a round, and its state as tensors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from job.config import OptimizerName, PruneConfig

OPTIMIZERS: dict[OptimizerName, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}


def build_optimizer(
    network: nn.Module, config: PruneConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """Build the optimizer of ``config`` over the current parameters of ``network``.

    Build a new optimizer after each cut: the old one updates the tensors of the wide network. The
    parameters of one dimension, γ and biases, get no weight decay.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.optimizer](groups, lr=config.lr, fused=fused)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the state of ``optimizer`` as ``optimizer.{parameter number}.{name}`` -> tensor."""
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
    """Load the tensors of ``optimizer_tensors``, their keys without the prefix ``optimizer.``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            # fused kernels walk both in memory order: the layout must be the parameter's
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    # torch moves each value to the device that its kernel needs, e.g. a fused AdamW's step count
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
