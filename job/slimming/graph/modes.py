"""Contexts for forward passes that do not change a network."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import no_grad

from job.slimming.graph.layers import modules_of
from job.slimming.graph.snapshot import preserve_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from torch import nn


@contextmanager
def training_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module in train mode or eval mode within the context."""
    changed = [m for m in modules_of(network, once=True).values() if m.training != training]
    for module in changed:
        vars(module)["training"] = training  # as ``nn.Module.__setattr__`` does, slowly
    try:
        yield
    finally:
        for module in changed:
            vars(module)["training"] = not training


@contextmanager
def eval_with_hooks(
    network: nn.Module,
    hooks: Iterable[tuple[nn.Module, Callable[[nn.Module, Any], None]]],
    *,
    values: bool = True,
) -> Iterator[None]:
    """Put ``network`` in eval mode without gradients, with hooks on the inputs of layers.

    All state of the network is restored at the end, except for the values of its buffers if
    ``values`` is False.
    """
    with preserve_state(network, values=values), training_mode(network, training=False), no_grad():
        for layer, hook in hooks:
            layer.register_forward_pre_hook(hook)
        yield


@contextmanager
def on_device(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep ``network`` on ``device`` within the context."""
    before = next(network.parameters()).device
    network.to(device)
    try:
        yield
    finally:
        network.to(before)
