"""Saved state of one container, class, closure or generator, and how to restore it.

``restore`` of each record restores the state in place and returns the objects that it replaces.
"""

from __future__ import annotations

import functools
import operator
import random
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterable, Mapping

ABSENT = object()
CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, deque, set)  # the first comes first


class Saved(Protocol):
    """Record of some state."""

    def restore(self) -> Iterable[Any]:
        """Restore the state; returns the objects that it replaces."""
        ...


class SavedContainer(NamedTuple):
    """Items of a dict, list, deque or set; ``before`` is a copy of a dict, else a list.

    The methods of a class that derives from these are not called, e.g. a ``__getitem__`` that makes
    an object of each item.
    """

    store: Any
    before: Any

    @classmethod
    def of(cls, store: Any) -> SavedContainer:
        """Save the items of ``store``."""
        base = container_class(store)
        if issubclass(base, dict):
            return cls(store, dict(store if type(store) is base else base.items(store)))
        return cls(store, list(base.__iter__(store)))

    def restore(self) -> Iterable[Any]:
        """Restore the items."""
        store, before = self
        base: Any = container_class(store)
        now = store if type(store) is base else SavedContainer.of(store).before
        if _same_items(now, before):
            return ()
        replaced = list(now.values() if isinstance(now, dict) else now)
        base.clear(store)
        if isinstance(before, dict):
            for key, value in before.items():
                base.__setitem__(store, key, value)
        else:
            (base.update if base is set else base.extend)(store, before)
        return replaced


class SavedGlobals(NamedTuple):
    """Values of some names in a module; ABSENT for names without a value."""

    space: dict[str, object]
    names: Mapping[str, object]

    def restore(self) -> Iterable[Any]:
        """Restore the names."""
        replaced = []
        for name, value in self.names.items():
            if self.space.get(name, ABSENT) is not value:
                replaced.append(self.space.pop(name))
                if value is not ABSENT:
                    self.space[name] = value
        return replaced


class SavedClass(NamedTuple):
    """Attributes of a class."""

    kind: type
    before: Mapping[str, object]

    def restore(self) -> Iterable[Any]:
        """Restore the attributes."""
        for name, value in dict(vars(self.kind)).items():
            if name not in self.before and not (name.startswith("__") and name.endswith("__")):
                delattr(self.kind, name)
            elif self.before.get(name, value) is not value:
                setattr(self.kind, name, self.before[name])
        return ()


class SavedType(NamedTuple):
    """Class of a module, which changes if the module is lazy."""

    module: Any
    kind: type

    def restore(self) -> Iterable[Any]:
        """Restore the class."""
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        return ()


class SavedCell(NamedTuple):
    """Variable of a closure."""

    cell: types.CellType
    content: Any

    def restore(self) -> Iterable[Any]:
        """Restore the variable."""
        if self.cell.cell_contents is not self.content:
            self.cell.cell_contents = self.content
        return ()


class SavedCache(NamedTuple):
    """Number of values that a functools cache had computed."""

    cache: Any
    misses: int

    def restore(self) -> Iterable[Any]:
        """Clear the cache if it has new values, which cannot be removed one by one."""
        if self.cache.cache_info().misses != self.misses:
            self.cache.cache_clear()
        return ()


class SavedSlots(NamedTuple):
    """Values of the ``__slots__`` of an object."""

    owner: Any
    before: Mapping[str, object]

    def restore(self) -> Iterable[Any]:
        """Restore the attributes, bypassing any ``__setattr__`` of the class."""
        replaced = []
        for name, value in self.before.items():
            if getattr(self.owner, name, ABSENT) is not value:
                replaced.append(getattr(self.owner, name, None))
                if value is ABSENT:
                    object.__delattr__(self.owner, name)
                else:
                    object.__setattr__(self.owner, name, value)
        return replaced


class SavedGenerator(NamedTuple):
    """State of a random number generator."""

    set_state: Callable[[Any], Any]
    state: Any

    def restore(self) -> Iterable[Any]:
        """Restore the state."""
        self.set_state(self.state)
        return ()


class SavedArray(NamedTuple):
    """Values of a NumPy array."""

    array: Any
    before: Any

    def restore(self) -> Iterable[Any]:
        """Restore the values."""
        self.array[...] = self.before
        return ()


@dataclass(frozen=True)
class SavedValues:
    """Values of a tensor, and the memory that contains them."""

    tensor: torch.Tensor
    memory: torch.Tensor  # a view of the same memory; code may give ``tensor`` other memory
    values: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> SavedValues:
        """Save the values of a tensor."""
        memory = tensor.detach()
        return cls(tensor, memory, memory.clone(), tensor._version)

    def restore(self) -> Iterable[Any]:
        """Restore memory and values."""
        changed = self.tensor._version != self.version
        if memory_layout(self.tensor) != memory_layout(self.memory):
            self.tensor.data = self.memory
        if changed:
            self.memory.copy_(self.values)
        return ()


def save_generators(tensors: Iterable[torch.Tensor]) -> list[SavedGenerator]:
    """Save the global random number generators of torch, Python, NumPy and the tensors' GPUs."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    on_gpus = [
        SavedGenerator(
            functools.partial(torch.cuda.set_rng_state, device=device),
            torch.cuda.get_rng_state(device),
        )
        for device in devices
    ]
    return [
        SavedGenerator(torch.set_rng_state, torch.get_rng_state()),
        SavedGenerator(random.setstate, random.getstate()),
        SavedGenerator(np.random.set_state, np.random.get_state()),
        *on_gpus,
    ]


def container_class(store: Any) -> Any:
    """Return the class of a container, or the one of Python that it derives from."""
    kind = type(store)
    return kind if kind in CONTAINERS else next(c for c in CONTAINERS if isinstance(store, c))


def has_plain_items(store: Any) -> bool:
    """Return whether the items of a container are read and set as those of Python's own."""
    kind, base = type(store), container_class(store)
    return kind is base or all(
        getattr(kind, n) is getattr(base, n) for n in ("__getitem__", "__setitem__")
    )


def _same_items(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if not before:  # a quick test, e.g. for the dicts of hooks of every module
        return True
    if isinstance(now, dict):
        same = all(map(operator.is_, now.values(), before.values()))
        return same and all(map(operator.is_, now, before))
    return now == set(before) if isinstance(now, set) else all(map(operator.is_, now, before))


def memory_layout(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return where and how the values of a tensor are stored; () without plain memory."""
    try:
        memory = tensor.untyped_storage()._cdata, tensor.storage_offset()
    except (NotImplementedError, RuntimeError):
        return ()
    return *memory, tensor.dtype, tensor.shape, tensor.stride()
