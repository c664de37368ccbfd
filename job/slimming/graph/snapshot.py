"""Snapshots of all state that is reachable from a network, restored after forward passes.

State is stored in attributes and containers, and also in code: closures, default arguments,
classes, module-level names and caches.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import threading
import types
import weakref
from collections import OrderedDict, UserDict, UserList, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from job.slimming.graph.saved_state import (
    ABSENT,
    Saved,
    SavedArray,
    SavedCache,
    SavedCell,
    SavedClass,
    SavedContainer,
    SavedGenerator,
    SavedGlobals,
    SavedSlots,
    SavedType,
    SavedValues,
    has_plain_items,
    save_generators,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    TensorPlace = tuple[Any, Any, torch.Tensor]  # a container, the key, the tensor

ATOMS = frozenset([bool, int, float, complex, str, bytes, types.NoneType, torch.Size, torch.dtype])
FOREIGN = frozenset(["torch", "numpy", *sys.stdlib_module_names]) - {"__main__"}
KEEPING = (  # classes of the standard library whose objects store other objects
    types.SimpleNamespace, argparse.Namespace, UserDict, UserList, weakref.WeakSet,
    weakref.WeakKeyDictionary, weakref.WeakValueDictionary,
)  # fmt: skip
LOCKS = (
    type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore,
)  # fmt: skip
DICTS = frozenset([dict, OrderedDict])
EMPTY: dict[Any, Any] = {}  # the contents of every empty dict, never changed
MAX_PARTS = 10_000  # items of a container; those of larger ones are not visited


@contextmanager
def preserve_state(network: nn.Module, *, values: bool = True) -> Iterator[Snapshot]:
    """Restore all state of ``network`` at the end: attributes, buffers, hooks, modes, caches.

    The contents of its classes, closures and module-level names are restored too, and the random
    generators of torch, Python and NumPy. With ``values`` this includes the values of buffers and
    other tensors; parameters are not expected to change.
    """
    snapshot = snapshot_of_all(network) if values else Snapshot(network)
    try:
        yield snapshot
    finally:
        snapshot.restore()


class Snapshot:
    """Snapshot of all state that is reachable from ``roots``; ``restore`` restores it in place.

    ``tensors`` are all tensors, ``tensor_places`` the attributes and lists that contain them.
    ``has_locks`` tells that there is a lock, so that one pass may wait for another.
    """

    def __init__(self, *roots: Any) -> None:
        self.tensors: list[torch.Tensor] = []
        self.has_locks = False
        self._saved: list[Saved] = []
        self._empty: list[dict[Any, Any]] = []  # most are dicts of hooks
        self._values: list[SavedValues] = []
        self._visited: set[int] = set()
        self._entered: set[int] = set()  # classes
        self._code: list[Any] = []  # classes and functions to enter
        self._visit(roots)
        self.tensor_places = list(self._find_places())  # without tensors that only code refers to
        while self._code:
            self._enter(self._code.pop())
        self._generators = save_generators(self.tensors)

    def _find_places(self) -> Iterator[TensorPlace]:
        for saved in self._saved:
            if not isinstance(saved, SavedContainer):
                continue
            store, before = saved
            if type(before) is dict and (type(store) is dict or has_plain_items(store)):
                for key, value in before.items():
                    if type(value) not in ATOMS and isinstance(value, torch.Tensor):
                        yield store, key, value
            elif type(store) is list:
                yield from ((store, k, v) for k, v in enumerate(before) if type(v) is torch.Tensor)

    def keep_values(self, tensors: Iterable[torch.Tensor]) -> None:
        """Restore the values of ``tensors`` too."""
        for tensor in tensors:
            if not (tensor.is_meta or tensor.is_inference() or is_lazy(tensor)):
                self._values.append(SavedValues.of(tensor))

    def restore(self) -> list[torch.Tensor]:
        """Restore all state; returns the tensors that it replaces."""
        replaced: list[Any] = []
        filled = [SavedContainer(store, EMPTY) for store in self._empty if store]
        for saved in (*filled, *self._saved, *self._values, *self._generators):
            replaced += saved.restore()
        return Snapshot(*replaced).tensors if replaced else []

    def _visit(self, values: Iterable[Any]) -> None:
        """Visit containers and objects; code is visited later."""
        waiting, visited = list(values), self._visited
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if kind in ATOMS or id(value) in visited:
                continue
            visited.add(id(value))
            if kind is types.FunctionType or kind is type:
                self._code.append(value)
            elif kind in DICTS and not value:
                self._empty.append(value)
            elif kind is not dict and isinstance(value, torch.Tensor):
                self.tensors.append(value)
            elif isinstance(value, (dict, list, deque, set)):
                self._saved.append(saved := SavedContainer.of(value))
                before = saved.before
                if len(before) < MAX_PARTS:
                    for part in before.values() if isinstance(before, dict) else before:
                        kind = type(part)
                        if kind in DICTS and not part:  # most are, of the attributes of a module
                            self._empty.append(part)
                        elif kind not in ATOMS:
                            waiting.append(part)
            elif isinstance(value, (tuple, frozenset)):
                waiting += value if len(value) < MAX_PARTS else ()
            elif isinstance(value, nn.Module):
                self._saved.append(SavedType(value, type(value)))
                self._code.append(type(value))
                waiting += (value.__dict__, *self._slots(value))
            else:
                waiting += self._parts(value)

    def _parts(self, value: Any) -> tuple[Any, ...]:
        """Save an object of another kind, and return its contents."""
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            return (getattr(value, "__func__", None), value.__self__)
        if isinstance(value, (type, functools._lru_cache_wrapper)):
            self._code.append(value)
        elif isinstance(value, (torch.Generator, np.random.RandomState)):
            self._saved.append(SavedGenerator(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            set_state = functools.partial(setattr, bits, "state")
            self._saved.append(SavedGenerator(set_state, bits.state))
        elif isinstance(value, random.Random):
            self._saved.append(SavedGenerator(value.setstate, value.getstate()))
        elif isinstance(value, LOCKS):
            self.has_locks = True
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.dtype != object:
                self._saved.append(SavedArray(value, value.copy()))
        elif not isinstance(value, types.ModuleType) and not _is_foreign(type(value)):
            self._code.append(type(value))
            return getattr(value, "__dict__", None), *self._slots(value)
        return ()

    def _slots(self, value: Any) -> tuple[Any, ...]:
        """Save the ``__slots__`` of an object, and return their values."""
        kind: Any = type(value)
        names = slots(kind)
        if not names:
            return ()
        before = {name: getattr(value, name, ABSENT) for name in names}
        self._saved.append(SavedSlots(value, before))
        return tuple(before.values())

    def _enter(self, code: Any) -> None:
        """Save the contents of a class, a function, or a function with a cache."""
        if isinstance(code, functools._lru_cache_wrapper):
            self._saved.append(SavedCache(code, code.cache_info().misses))
            self._visit([code.__wrapped__])
        elif isinstance(code, type):
            for kind in code.__mro__:
                if id(kind) not in self._entered:
                    self._entered.add(id(kind))
                    if not _is_foreign(kind):
                        self._enter_class(kind)
        elif not _is_foreign(code):
            self._enter_function(code)

    def _enter_class(self, kind: type) -> None:
        attributes = dict(vars(kind))
        self._saved.append(SavedClass(kind, attributes))
        self._visit(map(_function_in, attributes.values()))

    def _enter_function(self, function: types.FunctionType) -> None:
        parts = [function.__defaults__, function.__kwdefaults__, function.__dict__]
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            self._saved.append(SavedCell(cell, content))
            parts.append(content)
        space = function.__globals__
        names = {name: space.get(name, ABSENT) for name in _global_names(function.__code__)}
        self._saved.append(SavedGlobals(space, names))
        parts += [v for v in names.values() if type(v) is not types.ModuleType]
        self._visit(parts)


def snapshot_of_all(network: nn.Module) -> Snapshot:
    """Return a snapshot of a network that includes the values of tensors, except parameters."""
    snapshot = Snapshot(network)
    snapshot.keep_values(t for t in snapshot.tensors if not isinstance(t, nn.Parameter))
    return snapshot


def _function_in(attribute: Any) -> Any:
    """Return the function of an attribute of a class: a method of any kind, or a property."""
    if type(attribute) is types.FunctionType:
        return attribute
    return getattr(attribute, "__func__", None) or getattr(attribute, "fget", None) or attribute


@functools.lru_cache(maxsize=4096)
def slots(kind: Any) -> tuple[str, ...]:
    """Return the names of the ``__slots__`` of a class and its bases."""
    return tuple(
        name
        for each in kind.__mro__
        for name, value in vars(each).items()
        if isinstance(value, types.MemberDescriptorType) and "__slots__" in vars(each)
    )


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> frozenset[str]:
    """Return the global names that code may read or set, including inner functions."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return frozenset(code.co_names).union(*map(_global_names, inner))


def _is_foreign(code: Any) -> bool:
    """Return whether a class or function is from the standard library, torch or NumPy."""
    module = getattr(code, "__module__", None) or "builtins"
    return module.partition(".")[0] in FOREIGN and code not in KEEPING
