"""Inputs of a network: one tensor, a tuple of arguments, or a dict of keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

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
    return _rebuild(value, lambda part: map_tensors(part, change), (tuple, list, Mapping))


def _rebuild(value: Any, change: Callable[[Any], Any], kinds: tuple[Any, ...]) -> Any:
    if not isinstance(value, kinds):
        return value
    if isinstance(value, Mapping):
        return {key: change(part) for key, part in value.items()}
    parts: list[Any] = [change(part) for part in value]
    kind: Any = type(value)
    return kind(*parts) if hasattr(value, "_fields") else kind(parts)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))
    elif isinstance(value, SimpleNamespace):
        yield from tensors_in(vars(value))


def sample_count(example: Any) -> int:
    """Return the batch size: the length of the first tensor; 1 for a list or without tensors."""
    if isinstance(example, torch.Tensor):
        return len(example) if example.dim() else 1
    if isinstance(example, (tuple, Mapping)):
        for part in example.values() if isinstance(example, Mapping) else example:
            if isinstance(part, (torch.Tensor, tuple, list, Mapping)):
                return sample_count(part)
    return 1


def map_batched(example: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply ``change`` to each tensor whose first axis is the batch axis.

    Lists of inputs, e.g. of images of several sizes, and single numbers are not changed.
    """
    count = sample_count(example)

    def change_part(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return change(part) if part.dim() and len(part) == count and part.numel() > 1 else part
        return _rebuild(part, change_part, (tuple, Mapping))

    return change_part(example)


def repeat_first_sample(example: Example, count: int) -> Any:
    """Repeat the first sample of ``example`` ``count`` times, without gradients."""
    return map_batched(
        map_tensors(example, torch.Tensor.detach), lambda t: t[:1].expand(count, *t.shape[1:])
    )


def strip_values(example: Example) -> Any:
    """Reduce ``example`` to one sample without floating-point values: sizes and integers only."""
    return map_tensors(
        repeat_first_sample(example, 1),
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
