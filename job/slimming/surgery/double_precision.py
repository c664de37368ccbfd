"""Forward passes in float64 of networks whose code asks for float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

WIDER: dict[Any, Any] = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    "torch.FloatTensor": "torch.DoubleTensor",
}
CASTS = frozenset({"float", "half", "bfloat16"})


class DoublePrecision(TorchFunctionMode):
    """Compute in float64 where the code of a network names another precision, or none.

    Casts such as ``x.float()``, ``dtype=torch.float32`` and new tensors of the default precision
    become float64, as do tensors of other precisions that are passed to an op.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name in CASTS:
            return args[0].double()
        in_place = name.endswith("_") and not name.endswith("__")
        first, rest = (args[:1], args[1:]) if in_place else ((), args)
        named = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return _wide(func(*first, *map(_wide, rest), **named))


def _wide(value: Any) -> Any:
    """Return a tensor, or those in a tuple or list, or a dtype, in double precision."""
    if isinstance(value, torch.Tensor):
        wider = WIDER.get(value.dtype)
        return value if wider is None else value.to(wider)
    if isinstance(value, torch.dtype | str):
        return WIDER.get(value, value)
    return type(value)(map(_wide, value)) if type(value) in (tuple, list) else value
