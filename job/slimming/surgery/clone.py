"""Copies of networks that share nothing with the original, not even closures.

``copy.deepcopy`` does not copy functions, so that hooks and closures of the copy would still use
modules of the original. It also fails on locks, and on activations that a network keeps.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import io
import operator
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from job.errors import UsageError, is_out_of_memory, reason
from job.slimming.graph.layers import modules_of, tensors_of
from job.slimming.graph.snapshot import slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Value = TypeVar("Value")
COPY_METHODS = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")
MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
OBJECT_METHODS = {name: getattr(object, name, None) for name in COPY_METHODS}
# types that cannot be copied and do not contain anything that a network computes
SHARED = (
    type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.local,
    io.IOBase, types.ModuleType,
)  # fmt: skip
IMMUTABLE = frozenset([bool, int, float, str, type(None)])
PLAIN_CONTAINERS = frozenset([dict, OrderedDict, list, set])


def clone_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module with all of its contents.

    Functions that refer to modules or tensors of the network, in closures or defaults, are copied
    to refer to those of the copy. Objects whose class defines how to copy them are copied that way.
    ``memo`` maps ids of modules and tensors to their replacements in the copy. Raises UsageError
    with the name of an attribute that cannot be copied.
    """
    return _Cloner(module, memo).clone(module)


class _Cloner:
    def __init__(self, root: nn.Module, memo: dict[int, Any]) -> None:
        self.root, self.memo = root, memo
        self.plain: set[Any] = set()  # classes whose objects are copied attribute by attribute

    def clone(self, value: Value) -> Value:
        """Copy any value, or return its copy in the memo."""
        kind: Any = type(value)
        if kind in IMMUTABLE:
            return value
        copied: Any = self.memo.get(id(value))
        if copied is not None:
            return copied  # type: ignore[no-any-return]
        if kind in BY_TYPE:
            copied = BY_TYPE[kind](self, value)
        elif kind in self.plain:
            copied = self.clone_object(value)
        elif isinstance(value, torch.Tensor):
            copied = self.clone_tensor(value)
        elif isinstance(value, SHARED):
            return value
        elif _copies_plainly(kind):
            self.plain.add(kind)
            copied = self.clone_object(value)
        else:
            copied = copy.deepcopy(value, self.memo)
        return copied  # type: ignore[no-any-return]

    def clone_object(self, value: Any) -> Any:
        """Copy an object or a module attribute by attribute."""
        kind: Any = type(value)
        new = self.memo[id(value)] = kind.__new__(kind)
        attributes = getattr(new, "__dict__", {})
        for name, part in getattr(value, "__dict__", {}).items():
            kind_of_part = type(part)
            if kind_of_part in IMMUTABLE:
                attributes[name] = part
            elif kind_of_part in PLAIN_CONTAINERS and not part and id(part) not in self.memo:
                attributes[name] = self.memo[id(part)] = kind_of_part()  # e.g. of hooks
            else:
                attributes[name] = self.clone_attribute(value, name, part)
        for name in slots(kind):
            if hasattr(value, name):
                part = self.clone_attribute(value, name, getattr(value, name))
                object.__setattr__(new, name, part)
        return new

    def clone_attribute(self, owner: Any, name: str, value: Any) -> Any:
        if name == "forward" and isinstance(value, types.FunctionType):
            self.check_globals(owner, value)
        try:
            return self.clone(value)
        except (TypeError, AttributeError, RuntimeError) as error:  # e.g. of a generator
            if is_out_of_memory(error):
                raise
            where = f"{type(owner).__name__}.{name}"
            raise UsageError(
                f"the network cannot be copied because of its attribute {where}: {reason(error)}"
            ) from error

    def check_globals(self, owner: Any, forward: types.FunctionType) -> None:
        """Raise UsageError for a forward function that refers to the network by a global name."""
        for name in forward.__code__.co_names:
            if self.refers(forward.__globals__.get(name), set()):
                layer = next((n for n, m in modules_of(self.root).items() if m is owner), "")
                raise UsageError(
                    f"the forward function of {layer or 'the network'} uses the global name "
                    f"{name!r} for a part of the network, and would use the original in a copy: "
                    f"pass it as a default argument, {name}={name}"
                )

    def clone_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_leaf:
            return copy.deepcopy(tensor, self.memo)
        new = self.memo[id(tensor)] = tensor.detach().clone()  # an activation that is kept
        return new

    def clone_tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = list(map(self.clone, value))
        same = all(map(operator.is_, parts, value))
        return value if same else tuple(parts)

    def clone_list(self, value: list[Any]) -> list[Any]:
        new: list[Any] = []
        self.memo[id(value)] = new
        new += [self.clone(part) for part in value]
        return new

    def clone_set(self, value: set[Any]) -> set[Any]:
        new = self.memo[id(value)] = set()
        new.update(self.clone(part) for part in value)
        return new

    def clone_deque(self, value: deque[Any]) -> deque[Any]:
        new = self.memo[id(value)] = deque(maxlen=value.maxlen)
        new.extend(self.clone(part) for part in value)
        return new

    def clone_dict(self, value: Any) -> Any:
        kind = type(value)
        made = (self.clone(value.default_factory),) if kind is defaultdict else ()
        new = self.memo[id(value)] = kind(*made)
        if value:
            new.update((self.clone(key), self.clone(part)) for key, part in value.items())
        return new

    def clone_method(self, value: types.MethodType) -> types.MethodType:
        return types.MethodType(self.clone(value.__func__), self.clone(value.__self__))

    def clone_partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        args, kwargs = self.clone(value.args), self.clone(value.keywords)
        return functools.partial(self.clone(value.func), *args, **kwargs)

    def clone_cache(self, value: Any) -> Any:
        if not self.refers(value, set()):
            return value
        cached = functools.lru_cache(**value.cache_parameters())
        new = self.memo[id(value)] = cached(self.clone(value.__wrapped__))
        return new

    def clone_reference(self, value: weakref.ref[Any]) -> weakref.ref[Any]:
        return weakref.ref(self.clone(value())) if self.refers(value, set()) else value

    def clone_function(self, function: types.FunctionType) -> types.FunctionType:
        """Copy a function that refers to the network; other cells of its closure are shared."""
        if not self.refers(function, set()):
            return function
        cells = tuple(
            types.CellType() if self.refers(cell, set()) else cell
            for cell in function.__closure__ or ()
        )
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells
        )
        self.memo[id(function)] = new  # it may refer to itself
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            if cell is not old:
                cell.cell_contents = self.clone(old.cell_contents)
        new.__defaults__ = self.clone(function.__defaults__)
        new.__kwdefaults__ = self.clone(function.__kwdefaults__)
        new.__qualname__, new.__doc__ = function.__qualname__, function.__doc__
        vars(new).update(self.clone(vars(function)))
        return new

    @cached_property
    def network_ids(self) -> set[int]:
        """The ids of all modules and tensors of the network."""
        modules = modules_of(self.root, once=True).values()
        return {*map(id, modules), *(id(tensor) for *_, tensor in tensors_of(self.root))}

    def refers(self, value: Any, visited: set[int]) -> bool:
        """Return whether ``value`` is, or refers to, a module or tensor of the network."""
        if id(value) in self.network_ids:
            return True
        if id(value) in visited:
            return False
        visited.add(id(value))
        return any(self.refers(part, visited) for part in _contents(value))


# functions, not methods of a cloner: a cycle would keep the copies in memory for a while
BY_TYPE: dict[Any, Callable[[_Cloner, Any], Any]] = {
    tuple: _Cloner.clone_tuple,
    list: _Cloner.clone_list,
    set: _Cloner.clone_set,
    deque: _Cloner.clone_deque,
    dict: _Cloner.clone_dict,
    OrderedDict: _Cloner.clone_dict,
    defaultdict: _Cloner.clone_dict,
    types.MethodType: _Cloner.clone_method,
    functools.partial: _Cloner.clone_partial,
    types.FunctionType: _Cloner.clone_function,
    functools._lru_cache_wrapper: _Cloner.clone_cache,
    weakref.ref: _Cloner.clone_reference,
}


def _contents(value: Any) -> Iterable[Any]:
    """Return the objects that a function, a container or a plain object refers to."""
    if isinstance(value, types.CellType):
        with suppress(ValueError):  # an empty cell
            return (value.cell_contents,)
    if isinstance(value, types.FunctionType):
        contents = value.__defaults__, value.__kwdefaults__, vars(value)
        return (*(value.__closure__ or ()), *contents)
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, functools._lru_cache_wrapper):
        return (value.__wrapped__,)
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, dict):
        return dict.values(value)  # not those that a class derived from dict makes of them
    if isinstance(value, (list, tuple, set, deque)):
        return value
    if _copies_plainly(type(value)) and not isinstance(value, nn.Module):
        return getattr(value, "__dict__", {}).values()
    return ()


def _copies_plainly(kind: Any) -> bool:
    """Return whether objects of class ``kind`` can be copied attribute by attribute.

    This holds if the class has the default copy methods. Those of modules are looked up in
    nn.Module at each call, since torch.compile replaces one; ``__setstate__`` of convolutions is
    harmless.
    """
    if issubclass(kind, nn.Module):
        bases = nn.Module, nn.modules.conv._ConvNd
        return all(
            getattr(kind, name, None) in [getattr(base, name, None) for base in bases]
            for name in COPY_METHODS
        )
    made_in_python = kind.__flags__ & MADE_IN_PYTHON and kind.__new__ is object.__new__
    if not made_in_python or kind in copyreg.dispatch_table:
        return False
    return all(getattr(kind, name, None) is method for name, method in OBJECT_METHODS.items())


def clone_to(
    network: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None
) -> nn.Module:
    """Copy a network to ``device``, with floating-point tensors in ``dtype``."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        new_dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        new = tensor.detach().to(device, new_dtype, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return clone_module(network, memo)
