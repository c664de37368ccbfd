"""The code that calls an op: the module whose method runs, and the line of the network."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import FrameType

TORCH, OWN = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
NO_CALLER: tuple[None, frozenset[str]] = (None, frozenset())


def calling_module() -> tuple[nn.Module | None, frozenset[str]]:
    """Return the module of the innermost running method, and the attributes that it names.

    A function that gets the module as its first argument, or that a method defines, counts as a
    method. The attributes include those that the method names which calls it, such as a scale that
    is passed to the function.
    """
    frame: FrameType | None = sys._getframe(2)
    module: nn.Module | None = None
    named: frozenset[str] = frozenset()
    while frame is not None:
        value = _module_of(frame)
        if value is not None:
            if module is not None and value is not module:
                break
            module, named = value, named.union(frame.f_code.co_names)
            if frame.f_code.co_name == "forward":
                break
        frame = frame.f_back
    return module, named


def _module_of(frame: FrameType) -> nn.Module | None:
    """Return the module whose method runs, or a function that is defined within a method."""
    code = frame.f_code
    arguments = code.co_varnames[: min(1, code.co_argcount)]
    values = (frame.f_locals.get(name) for name in (*arguments, *code.co_freevars))
    return next((value for value in values if isinstance(value, nn.Module)), None)


def numbers_named(module: nn.Module | None, names: Collection[str]) -> dict[str, Any]:
    """Return the numbers, and the lists of numbers, among the attributes ``names`` of a module."""
    attributes = {} if module is None else vars(module)
    values = {name: attributes[name] for name in sorted(names) if name in attributes}
    return {name: value for name, value in values.items() if _is_numeric(value)}


def _is_numeric(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else (value,)
    return all(type(part) in (int, float) for part in parts)


def line_of_error(error: BaseException) -> str:
    """Return ``file:line`` of the network's code that raised ``error``, or its first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith((TORCH, OWN)):
            line = f"{Path(frame.f_code.co_filename).name}:{number}"
    return line


def line_of_network() -> str:
    """Return ``file:line`` of the innermost frame outside torch; empty if only torch code runs."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(OWN):
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
