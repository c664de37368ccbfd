"""Contexts for forward passes that leave a network as it was."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import no_grad

from job.slimming.graph.snapshot import preserve_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn


@contextmanager
def training_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module in train or in eval mode within the context."""
    changed = [module for module in network.modules() if module.training != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training


@contextmanager
def eval_with_hooks(
    network: nn.Module,
    hooks: Iterable[tuple[nn.Module, Callable[[nn.Module, Any], None]]],
    *,
    values: bool = True,
) -> Iterator[None]:
    """Put ``network`` in eval mode without gradients; each hook gets the inputs of its layer.

    All state of the network is put back at the end; without ``values``, the numbers in its buffers
    are not.
    """
    with preserve_state(network, values=values), training_mode(network, training=False), no_grad():
        for layer, hook in hooks:
            layer.register_forward_pre_hook(hook)
        yield
