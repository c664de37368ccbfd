"""Copies of networks of which nothing refers to the original: closures neither."""

from __future__ import annotations

import copy
import copyreg
import functools
import io
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.errors import UsageError, reason
from job.slimming.graph.layers import modules_of, tensors_of
from job.slimming.graph.snapshot import slots

if TYPE_CHECKING:
    from collections.abc import Iterable

COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")
MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
PLAIN_OBJECT = {name: getattr(object, name, None) for name in COPYING}
# what cannot be copied, and keeps nothing that a network computes
SHARED = (
    type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.local,
    io.IOBase, types.ModuleType,
)  # fmt: skip
PLAIN = frozenset([bool, int, float, str, type(None)])


def clone_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As copy.deepcopy does, but at once past what most of a module's attributes are.

    Functions that hold modules or tensors of the network, in closures or as defaults, become ones
    that hold those of the copy. Modules that copy in a way of their own do so. ``memo`` has what
    takes the place of some modules and tensors, by their id.
    """
    return _Copier(module, memo).module(module)


class _Copier:
    def __init__(self, root: nn.Module, memo: dict[int, Any]) -> None:
        self.root, self.memo = root, memo

    def module(self, module: nn.Module) -> nn.Module:
        memo, kind = self.memo, type(module)
        if id(module) in memo:
            known: nn.Module = memo[id(module)]
            return known
        if not _copies_plainly(kind):
            return copy.deepcopy(module, memo)
        new = memo[id(module)] = kind.__new__(kind)
        attributes = vars(new)
        for name, value in vars(module).items():
            if type(value) in PLAIN:
                attributes[name] = value
            elif name == "_modules":
                children = {key: m if m is None else self.module(m) for key, m in value.items()}
                attributes[name] = children
            elif name in ("_parameters", "_buffers"):
                attributes[name] = {key: self.tensor(t) for key, t in value.items()}
            elif type(value) in (dict, OrderedDict, set) and not value:
                attributes[name] = memo[id(value)] = type(value)()  # handles of hooks refer to it
            else:
                attributes[name] = self.attribute(module, name, value)
        self.slots(module, new)
        return new

    def attribute(self, owner: Any, name: str, value: Any) -> Any:
        try:
            return self.value(value)
        except (
            TypeError,
            AttributeError,
            RuntimeError,
        ) as error:  # as of generators, and of what has one
            where = f"{type(owner).__name__}.{name}"
            raise UsageError(
                f"the network cannot be copied, for its attribute {where}: {reason(error)}"
            ) from error

    def slots(self, old: Any, new: Any) -> None:
        kind: Any = type(old)
        for name in slots(kind):
            if hasattr(old, name):
                object.__setattr__(new, name, self.attribute(old, name, getattr(old, name)))

    def object(self, value: Any) -> Any:
        """An object that copies in no way of its own, with what it holds."""
        kind: Any = type(value)
        new = self.memo[id(value)] = kind.__new__(kind)
        for name, part in getattr(value, "__dict__", {}).items():
            vars(new)[name] = self.value(part)
        self.slots(value, new)
        return new

    def tensor(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        memo = self.memo
        if tensor is None or id(tensor) in memo:
            known: torch.Tensor | None = None if tensor is None else memo[id(tensor)]
            return known
        if type(tensor) is torch.Tensor and tensor.dim() == 0 and tensor._base is None:  # a counter
            memo[id(tensor)] = new = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            return new
        if not tensor.is_leaf:  # an activation that is kept
            memo[id(tensor)] = new = tensor.detach().clone()
            return new
        return copy.deepcopy(tensor, memo)

    def value(self, value: Any) -> Any:
        memo, kind = self.memo, type(value)
        if kind in PLAIN:
            return value
        if id(value) in memo:
            return memo[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if kind is tuple:
            parts = [self.value(part) for part in value]
            alike = all(new is old for new, old in zip(parts, value, strict=True))
            return value if alike else tuple(parts)
        if kind is list:
            items: list[Any] = []
            memo[id(value)] = items
            items += [self.value(part) for part in value]
            return items
        if kind is deque:
            ends = memo[id(value)] = deque(maxlen=value.maxlen)
            ends.extend(self.value(part) for part in value)
            return ends
        if kind is set:
            members = memo[id(value)] = set()
            members.update(self.value(part) for part in value)
            return members
        if kind in (dict, OrderedDict, defaultdict):
            made = (self.value(value.default_factory),) if kind is defaultdict else ()
            entries = memo[id(value)] = kind(*made)
            entries.update((self.value(key), self.value(part)) for key, part in value.items())
            return entries
        if kind is types.MethodType:
            return types.MethodType(self.value(value.__func__), self.value(value.__self__))
        if kind is functools.partial:
            args, kwargs = self.value(value.args), self.value(value.keywords)
            return functools.partial(self.value(value.func), *args, **kwargs)
        if kind is types.FunctionType:
            return self.function(value) if self.refers(value, set()) else value
        if kind is functools._lru_cache_wrapper and self.refers(value, set()):
            cached = functools.lru_cache(**value.cache_parameters())
            memo[id(value)] = new = cached(self.value(value.__wrapped__))
            return new
        if kind is weakref.ref:
            return weakref.ref(self.value(value())) if self.refers(value, set()) else value
        if isinstance(value, SHARED):
            return value
        if _is_plain(kind):
            return self.object(value)
        return copy.deepcopy(value, memo)

    def function(self, function: types.FunctionType) -> types.FunctionType:
        cells = tuple(
            types.CellType() if self.refers(cell, set()) else cell
            for cell in function.__closure__ or ()
        )
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells
        )
        self.memo[id(function)] = new  # it may hold itself
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            if cell is not old:
                cell.cell_contents = self.value(old.cell_contents)
        new.__defaults__ = self.value(function.__defaults__)
        new.__kwdefaults__ = self.value(function.__kwdefaults__)
        new.__qualname__, new.__doc__ = function.__qualname__, function.__doc__
        vars(new).update(self.value(vars(function)))
        return new

    @cached_property
    def own(self) -> set[int]:
        """Ids of all modules and tensors of the network."""
        modules = modules_of(self.root, once=True).values()
        return {*map(id, modules), *(id(tensor) for *_, tensor in tensors_of(self.root))}

    def refers(self, value: Any, seen: set[int]) -> bool:
        """Whether a function or what it holds is, or holds, something of the network."""
        if id(value) in self.own:
            return True
        if id(value) in seen:
            return False
        seen.add(id(value))
        parts: Iterable[Any] = ()
        if isinstance(value, types.CellType):
            with suppress(ValueError):  # an empty one
                parts = (value.cell_contents,)
        elif isinstance(value, types.FunctionType):
            held = value.__defaults__, value.__kwdefaults__, vars(value)
            parts = (*(value.__closure__ or ()), *held)
        elif isinstance(value, types.MethodType):
            parts = value.__func__, value.__self__
        elif isinstance(value, functools.partial):
            parts = value.func, value.args, value.keywords
        elif isinstance(value, functools._lru_cache_wrapper):
            parts = (value.__wrapped__,)
        elif isinstance(value, weakref.ref):
            parts = (value(),)
        elif _is_plain(type(value)):
            parts = getattr(value, "__dict__", {}).values()
        elif isinstance(value, dict):
            parts = value.values()
        elif isinstance(value, (list, tuple, set, deque)):
            parts = value
        return any(self.refers(part, seen) for part in parts)


def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Whether modules of a class copy in no way of their own; that of convolutions counts as none.

    Compared with nn.Module as it is now: torch.compile replaces a method of it.
    """
    plain = nn.Module, nn.modules.conv._ConvNd
    return all(
        getattr(kind, name, None) in [getattr(one, name, None) for one in plain] for name in COPYING
    )


def _is_plain(kind: Any) -> bool:
    """Whether copies of objects of a class are new ones with copies of what they hold."""
    own = kind.__flags__ & MADE_IN_PYTHON and kind.__new__ is object.__new__
    if not own or kind in copyreg.dispatch_table:
        return False
    return all(getattr(kind, name, None) is plain for name, plain in PLAIN_OBJECT.items())
