"""Inputs of a network: one tensor, a tuple of arguments, or a dict of keyword arguments.

An argument, and the output of a network, may contain tensors in tuples, lists, dicts, dataclasses,
and objects of a user's own classes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from enum import Enum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

WITHOUT_TENSORS = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device, slice])
OWNERS_WITHOUT_TENSORS = frozenset(
    "builtins collections torch numpy threading weakref _thread io".split()
)
Example = torch.Tensor | tuple[Any, ...] | dict[str, Any]


def call_network(network: nn.Module, example: Example) -> Any:
    """Run ``network`` on ``example``; returns its outputs."""
    if isinstance(example, torch.Tensor):
        return network(example)
    return network(**example) if isinstance(example, dict) else network(*example)


def arguments_for(network: nn.Module, given: Any) -> Example:
    """Convert a batch of the user to the form that ``call_network`` takes.

    A tuple or list contains positional arguments, a dict keyword arguments. A list or dict that
    fits ``forward`` only as a single argument is passed as that argument.
    """
    if isinstance(given, (torch.Tensor, tuple)):
        return tuple(given) if isinstance(given, tuple) else given
    if not isinstance(given, (list, Mapping)):
        return (given,)
    spread: Example = dict(given) if isinstance(given, Mapping) else tuple(given)
    return (given,) if not _binds(network, spread) and _binds(network, (given,)) else spread


def _binds(network: nn.Module, example: Example) -> bool:
    signature = inspect.signature(network.forward)
    try:
        signature.bind(**example) if isinstance(example, dict) else signature.bind(*example)
    except TypeError:
        return False
    return True


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply ``change`` to each tensor in ``value``, including nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return _map_parts(value, change, (tuple, list, Mapping), ())


def _map_parts(
    value: Any,
    change: Callable[[torch.Tensor], torch.Tensor],
    kinds: tuple[Any, ...],
    within: tuple[int, ...],
) -> Any:
    """Apply ``change`` to the tensors in containers of ``kinds`` and in objects.

    ``within`` are the ids of the objects that contain ``value``, which it may refer to.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping) and isinstance(value, kinds):
        return {key: _map_parts(part, change, kinds, within) for key, part in value.items()}
    if isinstance(value, kinds):
        parts: list[Any] = [_map_parts(part, change, kinds, within) for part in value]
        kind: Any = type(value)
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)
    if id(value) in within or next(tensors_in(fields_of(value)), None) is None:
        return value
    new = copy.copy(value)
    for name, part in fields_of(value).items():
        changed = _map_parts(part, change, kinds, (*within, id(value)))
        object.__setattr__(new, name, new if part is value else changed)
    return new


def tensors_in(value: Any, within: tuple[int, ...] = ()) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists, dicts, dataclasses and objects, in order.

    ``within`` are the ids of the objects that contain ``value``, which it may refer to.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            if isinstance(part, torch.Tensor):
                yield part
            elif type(part) not in WITHOUT_TENSORS:
                yield from tensors_in(part, within)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part, within)
    elif type(value) not in WITHOUT_TENSORS and id(value) not in within:
        for part in fields_of(value).values():
            yield from tensors_in(part, (*within, id(value)))


def fields_of(value: Any) -> dict[str, object]:
    """Return the attributes of a dataclass or an object of a user's class, by name.

    There are none for values of Python and torch, functions, types, and modules.
    """
    kind = type(value)
    if hasattr(kind, "__dataclass_fields__"):
        return {name: getattr(value, name, None) for name in kind.__dataclass_fields__}
    if isinstance(value, SimpleNamespace):
        return vars(value)
    if isinstance(value, (type, Enum, torch.nn.Module)) or callable(value):
        return {}
    if kind.__module__.partition(".")[0] in OWNERS_WITHOUT_TENSORS:
        return {}
    slots = (name for each in kind.__mro__ for name in _names(each.__dict__.get("__slots__", ())))
    fields = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return fields | getattr(value, "__dict__", {})


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def sample_count(example: Any) -> int:
    """Return the batch size: the length of the first tensor; 1 for a list or without tensors."""
    if isinstance(example, torch.Tensor):
        return len(example) if example.dim() else 1
    if isinstance(example, list):
        return 1
    parts = example.values() if isinstance(example, Mapping) else example
    for part in parts if isinstance(example, (tuple, Mapping)) else fields_of(example).values():
        if isinstance(part, (torch.Tensor, tuple, list, Mapping)) or fields_of(part):
            return sample_count(part)
    return 1


def map_batched(example: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply ``change`` to each tensor whose first axis is the batch axis.

    Lists of inputs, e.g. of images of several sizes, and single numbers are not changed.
    """
    count = sample_count(example)

    def change_batch(part: torch.Tensor) -> torch.Tensor:
        return change(part) if part.dim() and len(part) == count and part.numel() > 1 else part

    return _map_parts(example, change_batch, (tuple, Mapping), ())


def repeat_first_sample(example: Example, count: int) -> Any:
    """Repeat the first sample of ``example`` ``count`` times, without gradients."""
    return map_batched(
        map_tensors(example, torch.Tensor.detach), lambda t: t[:1].expand(count, *t.shape[1:])
    )


def strip_values(example: Example) -> Any:
    """Reduce ``example`` to one sample without floating-point values: sizes and integers only.

    Two samples stay if there is a tensor (B,), e.g. of classes: alone, it would be one number.
    """
    count = sample_count(example)
    alone = any(t.dim() == 1 and len(t) == count > 1 for t in tensors_in(example))
    return map_tensors(
        repeat_first_sample(example, 2 if alone else 1),
        lambda t: t.to("meta") if t.is_floating_point() else t.clone(),
    )


def move_like(example: Example, tensor: torch.Tensor) -> Any:
    """Move ``example`` to the device of ``tensor``, and floating-point tensors to its dtype."""
    return map_tensors(
        example, lambda t: t.to(tensor) if t.is_floating_point() else t.to(tensor.device)
    )


def batch_signature(example: Example) -> object:
    """Return what batches must have in common to be concatenated: all but the batch size."""
    if isinstance(example, torch.Tensor):
        return example.shape[1:], example.dtype
    count = sample_count(example)
    parts = example.values() if isinstance(example, dict) else example
    if any(not (isinstance(p, torch.Tensor) and p.dim() and len(p) == count) for p in parts):
        return object()  # equals no other signature
    return tuple(example) if isinstance(example, dict) else None, tuple(map(batch_signature, parts))


def concatenate(examples: Sequence[Example]) -> Any:
    """Concatenate the samples of examples that have the same ``batch_signature``."""
    first = examples[0]
    if len(examples) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(map(next, map(tensors_in, examples))))
    columns = map(torch.cat, zip(*map(tensors_in, examples), strict=True))
    return dict(zip(first, columns, strict=True)) if isinstance(first, dict) else tuple(columns)


def describe_inputs(example: Example) -> str:
    """Describe the sizes of the tensors in ``example``, for a message."""
    if isinstance(example, torch.Tensor) and example.dim() == 4:
        return f"images of {' x '.join(map(str, example.shape[1:]))}"
    return "inputs of " + ", ".join(str(tuple(t.shape)) for t in tensors_in(example))


def kind_of(value: Any) -> str:
    """Describe ``value`` briefly, for a message."""
    if isinstance(value, torch.Tensor):
        return f"one tensor of {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a {type(value).__name__}"
