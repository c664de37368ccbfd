"""A network that is run without a trace: all state of it, of its code and of chance, put back."""

from __future__ import annotations

import argparse
import functools
import operator
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ATOMS = frozenset([bool, int, float, complex, str, bytes, types.NoneType, torch.Size, torch.dtype])
FOREIGN = frozenset(["torch", "numpy", *sys.stdlib_module_names]) - {"__main__"}
KEEPING = (  # classes of the standard library whose objects keep what they are given
    types.SimpleNamespace, argparse.Namespace, UserDict, UserList, weakref.WeakSet,
    weakref.WeakKeyDictionary, weakref.WeakValueDictionary,
)  # fmt: skip
LOCKS = (
    type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore,
)  # fmt: skip
HOOKS = (dict, OrderedDict)
MOST_PARTS = 10_000  # of a container that is looked into
_ABSENT = object()
Place = tuple[Any, Any, torch.Tensor]


@contextmanager
def preserve_state(network: nn.Module, *, values: bool = True) -> Iterator[Snapshot]:
    """Put back all state of ``network`` at the end: attributes, buffers, hooks, modes, caches.

    Also what its classes, closures and module-level names held, and the generators of torch,
    Python and NumPy. With ``values`` the numbers in buffers and other tensors too; parameters are
    not expected to change.
    """
    snapshot = Snapshot(network)
    if values:
        snapshot.keep(t for t in snapshot.tensors if not isinstance(t, nn.Parameter))
    try:
        yield snapshot
    finally:
        snapshot.restore()


class Snapshot:
    """Every container that a network reaches, with what was in it; each is put back in place.

    ``tensors`` are those found. Containers behind code (closures, defaults, classes, module-level
    names that are used) count as much as attributes do.
    """

    def __init__(self, *roots: Any) -> None:
        self.tensors: list[torch.Tensor] = []
        # of a trace's tensors on the meta device: by id of the original, and their names
        self.shadows: tuple[dict[int, torch.Tensor], dict[int, str]] | None = None
        self.locks = False  # something of it can be locked: one pass may wait for another
        self.custom = False  # the code has functions of its own for autograd
        self._stores: list[tuple[Any, Any]] = []
        self._empty: list[dict[Any, Any]] = []  # most of those with hooks
        self._names: list[tuple[dict[str, Any], dict[str, Any]]] = []  # some of a module's globals
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._kinds: list[tuple[nn.Module, type]] = []  # those of lazy modules change
        self._cells: list[tuple[types.CellType, Any]] = []
        self._caches: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, dict[str, Any]]] = []
        self._generators: list[tuple[Callable[[Any], Any], Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._values: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = []
        self._seen: set[int] = set()
        self._entered: set[int] = set()
        self._code: list[Any] = []
        self._walk(roots)
        self._own = len(self._stores)
        while self._code:
            self._enter(self._code.pop())
        self._chance = _chance(self.tensors)

    @functools.cached_property
    def places(self) -> list[Place]:
        """The containers of attributes that hold tensors: each with the key, and the tensor."""
        found: list[Place] = []
        for store, before in self._stores[: self._own]:
            if before and type(before) is dict:
                found += [(store, k, v) for k, v in before.items() if isinstance(v, torch.Tensor)]
            elif before and type(before) is list and type(store) is list:
                found += [(store, k, v) for k, v in enumerate(before) if type(v) is torch.Tensor]
        return found

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put back the numbers in these too."""
        for tensor in tensors:
            if not (tensor.is_meta or tensor.is_inference() or is_lazy(tensor)):
                was = tensor.detach()  # its place in memory, of which it may get another one
                self._values.append((tensor, was, was.clone(), tensor._version))

    def restore(self) -> list[torch.Tensor]:
        """Put everything back; the tensors that were in its place."""
        new: list[Any] = []
        for store, before in self._stores:
            if not _same(store, before):
                new += store.values() if isinstance(store, dict) else store
                store.clear()
                (store.update if isinstance(store, (dict, set)) else store.extend)(before)
        for store in self._empty:
            if store:
                new += store.values()
                store.clear()
        for space, names in self._names:
            for name, value in names.items():
                if space.get(name, _ABSENT) is not value:
                    new.append(space.pop(name))
                    if value is not _ABSENT:
                        space[name] = value
        for kind, attributes in self._classes:
            _restore_class(kind, attributes)
        for module, kind in self._kinds:
            if type(module) is not kind:
                module.__class__ = kind
        for cell, content in self._cells:
            if cell.cell_contents is not content:
                cell.cell_contents = content
        for cache, before in self._caches:
            if cache.cache_info().misses != before:
                cache.cache_clear()  # what was added cannot be taken out by itself
        for owner, before in self._slots:
            for name, value in before.items():
                if getattr(owner, name, _ABSENT) is not value:
                    new.append(getattr(owner, name, None))
                    _set_slot(owner, name, value)
        for put, state in self._generators:
            put(state)
        for array, before in self._arrays:
            array[...] = before
        for tensor, was, numbers, version in self._values:
            changed = tensor._version != version
            if _place(tensor) != _place(was):
                tensor.data = was
            if changed:
                was.copy_(numbers)
        _set_chance(self._chance)
        return Snapshot(*new).tensors if new else []

    def _walk(self, values: Iterable[Any]) -> None:
        """Look into containers and objects; code that is met is left for later."""
        waiting, seen, stores, empty = list(values), self._seen, self._stores, self._empty
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if kind in ATOMS or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                self.tensors.append(value)
            elif isinstance(value, dict):
                before = dict(value)
                stores.append((value, before))
                if before and len(before) < MOST_PARTS:
                    waiting += [part for part in before.values() if type(part) not in ATOMS]
            elif isinstance(value, nn.Module):
                self._kinds.append((value, kind))
                if id(kind) not in self._entered:
                    self._code.append(kind)
                attributes = value.__dict__
                stores.append((attributes, dict(attributes)))
                waiting += self._slotted(value)
                for part in attributes.values():
                    if type(part) in ATOMS:
                        continue
                    if type(part) in HOOKS and not part:  # most: at once
                        empty.append(part)
                    else:
                        waiting.append(part)
            elif isinstance(value, (list, deque, set)):
                stores.append((value, list(value)))
                waiting += value if len(value) < MOST_PARTS else ()
            elif isinstance(value, (tuple, frozenset)):
                waiting += value if len(value) < MOST_PARTS else ()
            else:
                waiting += self._parts(value)

    def _parts(self, value: Any) -> tuple[Any, ...]:
        """What is in an object of another kind."""
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            return (getattr(value, "__func__", None), value.__self__)
        if isinstance(value, (types.FunctionType, type, functools._lru_cache_wrapper)):
            self._code.append(value)
        elif isinstance(value, (torch.Generator, np.random.RandomState)):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._generators.append((functools.partial(setattr, bits, "state"), bits.state))
        elif isinstance(value, random.Random):
            self._generators.append((value.setstate, value.getstate()))
        elif isinstance(value, LOCKS):
            self.locks = True
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.dtype != object:
                self._arrays.append((value, value.copy()))
        elif not isinstance(value, types.ModuleType) and not _foreign(type(value)):
            self._code.append(type(value))
            return getattr(value, "__dict__", None), *self._slotted(value)
        return ()

    def _slotted(self, value: Any) -> tuple[Any, ...]:
        """What is in an object's slots."""
        kind: Any = type(value)
        names = slots(kind)
        if not names:
            return ()
        before = {name: getattr(value, name, _ABSENT) for name in names}
        self._slots.append((value, before))
        return tuple(before.values())

    def _enter(self, code: Any) -> None:
        """Look into what code holds: a class, a function, a function with a cache."""
        if isinstance(code, functools._lru_cache_wrapper):
            self._caches.append((code, code.cache_info().misses))
            self._walk([code.__wrapped__])
        elif isinstance(code, type):
            for kind in code.__mro__:
                if id(kind) not in self._entered:
                    self._entered.add(id(kind))
                    if not _foreign(kind):
                        self._enter_class(kind)
        elif not _foreign(code):
            self._enter_function(code)

    def _enter_class(self, kind: type) -> None:
        self.custom |= issubclass(kind, torch.autograd.Function)
        attributes = dict(vars(kind))
        self._classes.append((kind, attributes))
        for value in attributes.values():
            inner = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
            self._walk([inner])

    def _enter_function(self, function: types.FunctionType) -> None:
        self._walk([function.__defaults__, function.__kwdefaults__, function.__dict__])
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # an empty one
                continue
            self._cells.append((cell, content))
            self._walk([content])
        space = function.__globals__
        names = {name: space.get(name, _ABSENT) for name in _names(function.__code__)}
        self._names.append((space, names))
        self._walk([v for v in names.values() if not isinstance(v, types.ModuleType)])


@functools.lru_cache(maxsize=4096)
def slots(kind: Any) -> tuple[str, ...]:
    """The names of the attributes that objects of a class have besides those in their dict."""
    return tuple(
        name
        for each in kind.__mro__
        for name, value in vars(each).items()
        if isinstance(value, types.MemberDescriptorType) and "__slots__" in vars(each)
    )


def _set_slot(owner: Any, name: str, value: Any) -> None:
    """As it is set in no way of the object's own."""
    if value is _ABSENT:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, value)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where a tensor's numbers are; those without a plain memory have none."""
    try:
        place = tensor.untyped_storage()._cdata, tensor.storage_offset()
    except (NotImplementedError, RuntimeError):
        return ()
    return *place, tensor.dtype, tensor.shape, tensor.stride()


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The global names that code may read or set, that of functions in it too."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


def _foreign(code: Any) -> bool:
    """Whether a class or function is of the standard library, torch or NumPy."""
    module = getattr(code, "__module__", None) or "builtins"
    return module.partition(".")[0] in FOREIGN and code not in KEEPING


def _same(store: Any, before: Any) -> bool:
    if len(store) != len(before):
        return False
    if not before:
        return True
    if isinstance(store, dict):
        alike = all(map(operator.is_, store.values(), before.values()))
        return alike and all(map(operator.is_, store, before))
    return store == set(before) if isinstance(store, set) else all(map(operator.is_, store, before))


def _restore_class(kind: type, before: dict[str, Any]) -> None:
    now = dict(vars(kind))
    for name, value in now.items():
        if name not in before and not (name.startswith("__") and name.endswith("__")):
            delattr(kind, name)
        elif before.get(name, value) is not value:
            setattr(kind, name, before[name])


def _chance(tensors: Iterable[torch.Tensor]) -> tuple[Any, ...]:
    """The states of all generators of random numbers that a network may use."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    on_gpu = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return torch.get_rng_state(), random.getstate(), np.random.get_state(), on_gpu


def _set_chance(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    for device, state in states[3]:
        torch.cuda.set_rng_state(state, device)
