"""The code that calls an op: the module whose method runs, and the line of the network."""

from __future__ import annotations

import functools
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from types import FrameType

TORCH, OWN = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])


class Caller(NamedTuple):
    """The module whose method calls an op, and the attributes that the method names.

    ``near`` are other modules in its local variables, whose attributes it may name.
    """

    module: nn.Module | None = None
    names_used: frozenset[str] = frozenset()
    near: tuple[nn.Module, ...] = ()

    @property
    def numbers(self) -> dict[str, Any]:
        """Attributes of the module that the method names and that are numbers, or lists of them."""
        return self.numbers_of(self.module)

    def numbers_of(self, module: nn.Module | None) -> dict[str, Any]:
        """Return such attributes of ``module``, e.g. of one that is near."""
        attributes = {} if module is None else vars(module)
        values = {name: attributes[name] for name in sorted(self.names_used) if name in attributes}
        return {name: value for name, value in values.items() if _is_numeric(value)}


NO_CALLER = Caller()


def calling_module() -> Caller:
    """Return the module of the innermost running method, and the attributes that it names.

    A function that gets the module as its first argument, or that a method defines, counts as a
    method. The attributes include those that the method names which calls it, such as a scale that
    is passed to the function.
    """
    frame: FrameType | None = sys._getframe(2)
    module: nn.Module | None = None
    named: frozenset[str] = frozenset()
    near: dict[int, nn.Module] = {}
    while frame is not None:
        value = _module_of(frame)
        if value is not None:
            if module is not None and value is not module:
                break
            module, named = value, named.union(frame.f_code.co_names)
            near |= {id(v): v for v in frame.f_locals.values() if isinstance(v, nn.Module)}
            if frame.f_code.co_name == "forward":
                break
        frame = frame.f_back
    near.pop(id(module), None)
    return Caller(module, named, tuple(near.values()))


def _module_of(frame: FrameType) -> nn.Module | None:
    """Return the module whose method runs, or a function that is defined within a method."""
    code = frame.f_code
    arguments = code.co_varnames[: min(1, code.co_argcount)]
    values = (frame.f_locals.get(name) for name in (*arguments, *code.co_freevars))
    return next((value for value in values if isinstance(value, nn.Module)), None)


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
            line = f"{_file_name(frame.f_code.co_filename)}:{number}"
    return line


@functools.lru_cache(maxsize=4096)
def _file_name(path: str) -> str:
    return Path(path).name


def line_of_network() -> str:
    """Return ``file:line`` of the innermost frame outside torch; empty if only torch code runs."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(OWN):
        return ""
    return f"{_file_name(frame.f_code.co_filename)}:{frame.f_lineno}"
