"""A user's function in place of the forward pass of a network, while it is cut."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from job.errors import UsageError
from job.slimming.inputs import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn


class ForwardCall:
    """Call ``forward(model, …)`` as the forward pass of ``model``.

    Within ``forward`` the network has its own forward pass. A copy of the network has a copy of
    this object, which calls the copy.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self.replaced: Any = vars(model).get("forward")  # of some networks only

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the function without the network."""
        signature = inspect.signature(self.forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        self.remove()
        try:
            return self.forward(self.model, *args, **kwargs)
        finally:
            self.install()

    def install(self) -> None:
        """Let the network call the function."""
        vars(self.model)["forward"] = self

    def remove(self) -> None:
        """Restore the forward pass of the network."""
        del vars(self.model)["forward"]
        if self.replaced is not None:
            vars(self.model)["forward"] = self.replaced


@contextmanager
def forward_pass(model: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Make ``model`` call ``forward(model, …)`` as its forward pass within the context.

    Copies of ``model`` made within it do the same until ``own_forward_pass`` is called on them.
    Raises UsageError if ``forward`` is not a function of the network and its inputs.
    """
    if forward is None:
        yield
        return
    if not callable(forward):
        raise UsageError(
            "forward must be a function of the network and its inputs, e.g. lambda network, "
            f"images: network.backbone(images); got {kind_of(forward)}"
        )
    call = ForwardCall(model, forward)
    call.install()
    try:
        yield
    finally:
        call.remove()


def own_forward_pass(narrow: nn.Module) -> nn.Module:
    """Return ``narrow``, a copy of a network within ``forward_pass``, with its own forward pass."""
    call = vars(narrow).get("forward")
    if isinstance(call, ForwardCall):
        call.remove()
    return narrow
