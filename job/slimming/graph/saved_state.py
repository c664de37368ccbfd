"""What one container, class, closure or generator held, and how that is put back.

``restore`` of each record puts it back in place and returns what was there instead, or nothing.
"""

from __future__ import annotations

import functools
import operator
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterable

ABSENT = object()


class Saved(Protocol):
    """A record of some state."""

    def restore(self) -> Iterable[Any]:
        """Put the state back; returns the objects that it replaces."""
        ...


class SavedContainer(NamedTuple):
    """The items of a dict, list, deque or set; ``before`` is a copy of a dict, else a list."""

    store: Any
    before: Any

    def restore(self) -> Iterable[Any]:
        """Put the items back."""
        store, before = self
        if _same_items(store, before):
            return ()
        replaced = list(store.values() if isinstance(store, dict) else store)
        store.clear()
        (store.update if isinstance(store, (dict, set)) else store.extend)(before)
        return replaced


class SavedGlobals(NamedTuple):
    """Some names of a module, of which ABSENT ones had no value."""

    space: dict[str, Any]
    names: dict[str, Any]

    def restore(self) -> Iterable[Any]:
        """Put the names back."""
        replaced = []
        for name, value in self.names.items():
            if self.space.get(name, ABSENT) is not value:
                replaced.append(self.space.pop(name))
                if value is not ABSENT:
                    self.space[name] = value
        return replaced


class SavedClass(NamedTuple):
    """The attributes of a class."""

    kind: type
    before: dict[str, Any]

    def restore(self) -> Iterable[Any]:
        """Put the attributes back."""
        for name, value in dict(vars(self.kind)).items():
            if name not in self.before and not (name.startswith("__") and name.endswith("__")):
                delattr(self.kind, name)
            elif self.before.get(name, value) is not value:
                setattr(self.kind, name, self.before[name])
        return ()


class SavedType(NamedTuple):
    """The class of a module; that of lazy modules changes."""

    module: Any
    kind: type

    def restore(self) -> Iterable[Any]:
        """Give the module its class again."""
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        return ()


class SavedCell(NamedTuple):
    """A variable of a closure."""

    cell: types.CellType
    content: Any

    def restore(self) -> Iterable[Any]:
        """Put the variable back."""
        if self.cell.cell_contents is not self.content:
            self.cell.cell_contents = self.content
        return ()


class SavedCache(NamedTuple):
    """How many values a functools cache had computed."""

    cache: Any
    misses: int

    def restore(self) -> Iterable[Any]:
        """Clear a cache that has new values, of which none can be removed alone."""
        if self.cache.cache_info().misses != self.misses:
            self.cache.cache_clear()
        return ()


class SavedSlots(NamedTuple):
    """The ``__slots__`` of an object."""

    owner: Any
    before: dict[str, Any]

    def restore(self) -> Iterable[Any]:
        """Put the attributes back, past any __setattr__ of the object's class."""
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
    """The state of a random number generator."""

    set_state: Callable[[Any], Any]
    state: Any

    def restore(self) -> Iterable[Any]:
        """Put the state back."""
        self.set_state(self.state)
        return ()


class SavedArray(NamedTuple):
    """The values of a NumPy array."""

    array: Any
    before: Any

    def restore(self) -> Iterable[Any]:
        """Put the values back."""
        self.array[...] = self.before
        return ()


@dataclass(frozen=True)
class SavedValues:
    """The values of a tensor, and the memory that holds them."""

    tensor: torch.Tensor
    memory: torch.Tensor  # a view of the same memory, which ``tensor`` may leave for another one
    values: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> SavedValues:
        """Save the values of a tensor."""
        memory = tensor.detach()
        return cls(tensor, memory, memory.clone(), tensor._version)

    def restore(self) -> Iterable[Any]:
        """Put memory and values back."""
        changed = self.tensor._version != self.version
        if _layout(self.tensor) != _layout(self.memory):
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


def _same_items(store: Any, before: Any) -> bool:
    if len(store) != len(before):
        return False
    if not before:  # as the dicts of hooks, of which every module has a dozen
        return True
    if isinstance(store, dict):
        same = all(map(operator.is_, store.values(), before.values()))
        return same and all(map(operator.is_, store, before))
    return store == set(before) if isinstance(store, set) else all(map(operator.is_, store, before))


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where and how a tensor's values are stored; () for those without plain memory."""
    try:
        memory = tensor.untyped_storage()._cdata, tensor.storage_offset()
    except (NotImplementedError, RuntimeError):
        return ()
    return *memory, tensor.dtype, tensor.shape, tensor.stride()
