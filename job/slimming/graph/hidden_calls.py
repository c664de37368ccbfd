"""Calls whose ops a TorchFunctionMode does not see: functions of autograd, compiled TorchScript."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def autograd_calls() -> Iterator[list[Any]]:
    """Record the functions of autograd, outside torch, that are called within the context."""
    calls: list[Any] = []
    own = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            calls.append(cls)
        return own.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield calls
    finally:
        torch.autograd.Function.apply = own


@contextmanager
def scripted_functions_in_python() -> Iterator[None]:
    """Within the context, a function of TorchScript is the Python function that it is made from.

    torch keeps it with the compiled function, for torch.compile. Others run as they are.
    """
    kind: Any = torch.jit.ScriptFunction
    own = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = getattr(self, "_torchdynamo_inline", None) or own.__get__(self, kind)
        return function(*args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = own
