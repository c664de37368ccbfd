"""What a network computes: every torch op of one forward pass, in order.

Recorded under a TorchFunctionMode, so that Python control flow and shapes are plain, and functional
and module calls look alike. On torch's ``meta`` device nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from job.slimming.graph.layers import tensors_of
from job.slimming.graph.snapshot import preserve_state
from job.slimming.inputs import (
    call_network,
    map_tensors,
    repeat_first_sample,
    sample_count,
    tensors_of_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from job.slimming.graph.snapshot import Place, Snapshot
    from job.slimming.inputs import Example

IN_PLACE = frozenset({"add_", "__iadd__", "mul_", "__imul__"})
SUMS = frozenset({"add", "__add__", "mul", "__mul__"}) | IN_PLACE
# whose result has the shape and type of their first argument
SAME_SHAPE = frozenset(
    """batch_norm relu relu6 hardtanh silu gelu hardswish hardsigmoid sigmoid tanh leaky_relu
    elu""".split()
)
SIZES = frozenset({"size", "numel", "nelement"})
SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
BATCH = 2  # pictures: BatchNorm in train mode needs two values a channel


@dataclass(frozen=True)
class Op:
    """One call of a torch function: its name, arguments and result."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def inputs(self) -> Iterator[torch.Tensor]:
        """Every tensor among the arguments, in lists too."""
        return iter(self._inputs)

    @cached_property
    def _inputs(self) -> list[torch.Tensor]:
        return list(tensors_in((self.args, self.kwargs)))

    def results(self) -> Iterator[torch.Tensor]:
        """Every tensor of the result."""
        return tensors_in(self.result)


@dataclass(frozen=True)
class Trace:
    """Operations of one pass over ``inputs``; ``names`` tells parameters and buffers by id.

    ``inputs`` are of ``sample_count`` images, or whatever the network takes.
    ``constants`` are the ids of other tensors that the network keeps, or that its code does.
    ``measured`` are tensors whose size along another axis than the first was asked for.
    """

    ops: list[Op]
    names: dict[int, str]
    constants: frozenset[int]
    inputs: list[torch.Tensor]
    sample_count: int
    outputs: list[torch.Tensor]
    measured: list[torch.Tensor]

    def name(self, value: Any) -> str | None:
        """The parameter or buffer that a tensor is, if it is one."""
        return self.names.get(id(value))

    def steps(self) -> list[Op]:
        """The ops but for the counting of batches."""
        counters = {key for key, name in self.names.items() if name.endswith("batches_tracked")}
        return [op for op in self.ops if not (op.args and id(op.args[0]) in counters)]


def trace_network(network: nn.Module, example: Example, *, training: bool = False) -> Trace:
    """Run ``network`` on ``BATCH`` samples like those of ``example``; it is left untouched.

    On the ``meta`` device, or on the real one where the network does not run there. Raises whatever
    its forward pass raises.
    """
    with preserve_state(network, values=False) as snapshot:
        return trace_with_snapshot(network, example, snapshot, training=training)


def trace_with_snapshot(
    network: nn.Module, example: Example, snapshot: Snapshot, *, training: bool
) -> Trace:
    """As ``trace_network`` does, with the ``snapshot`` of the network that several traces share."""
    try:
        return _trace(network, example, "meta", snapshot, training)
    except Exception:  # meta tensors have no values, and some networks look at some
        return _trace(network, example, None, snapshot, training)


EQUAL = frozenset([int, float, str, slice, torch.device])


def same_ops(one: Trace, other: Trace) -> bool:
    """Whether the same is done in two traces, but for flags such as ``training``."""

    ours_of, theirs_of = one.names.get, other.names.get

    def same(ours: Any, theirs: Any) -> bool:
        kind = type(ours)
        if kind is not type(theirs):
            return False
        if isinstance(ours, torch.Tensor):
            return ours_of(id(ours)) == theirs_of(id(theirs))
        if isinstance(ours, (list, tuple)):
            return len(ours) == len(theirs) and all(map(same, ours, theirs))
        return kind is bool or ours is theirs or (kind in EQUAL and bool(ours == theirs))

    first, second = one.steps(), other.steps()
    return [op.name for op in first] == [op.name for op in second] and all(
        same(a.args[:3], b.args[:3])  # not the momentum, which is set in train mode alone
        if a.name == "batch_norm"
        else same(a.args, b.args) and (not (a.kwargs or b.kwargs) or same(*map(_items, (a, b))))
        for a, b in zip(first, second, strict=True)
    )


def _items(op: Op) -> list[tuple[str, Any]]:
    return list(op.kwargs.items())


@contextmanager
def training_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module in train or in eval mode, for a while."""
    modules = [(m, m.training) for m in network.modules() if m.training != training]
    for module, _ in modules:
        module.training = training
    try:
        yield
    finally:
        for module, was in modules:
            module.training = was


@contextmanager
def eval_with_hooks(
    network: nn.Module,
    hooks: Iterable[tuple[nn.Module, Callable[[nn.Module, Any], None]]],
    *,
    values: bool = True,
) -> Iterator[None]:
    """``network`` in eval mode without gradients; each hook sees what its layer will read.

    All of its state is put back; without ``values``, not the numbers in its buffers.
    """
    with (
        preserve_state(network, values=values),
        training_mode(network, training=False),
        torch.no_grad(),
    ):
        for layer, hook in hooks:
            layer.register_forward_pre_hook(hook)
        yield


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses."""
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


class _Tracer(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.measured: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        result = _known(name, args, kwargs or {})
        if result is None:
            result = func(*args, **(kwargs or {}))
        is_tensor = isinstance(result, torch.Tensor)
        if is_tensor or name == "__setitem__" or any(True for _ in tensors_in(result)):
            kept = _copied(args), _copied(kwargs or {})
            self.ops.append(Op(name, func, *kept, result))
        elif (name in SIZES and (*args[1:], *(kwargs or {}).values()) != (0,)) or func == SHAPE:
            self.measured.append(args[0])
        return result


def _known(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The result of what is slow on the ``meta`` device, where its shape is plain to see."""
    if name == "cat":
        return _joined(*args, **kwargs)
    first = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if first is None or not first.is_meta:
        return None
    if name == "conv2d" and not kwargs:
        return _convolved(*args)
    if name in SAME_SHAPE:
        if kwargs.get("inplace"):
            return first
        return torch.empty(first.shape, dtype=first.dtype, device="meta")
    other = args[1] if name in SUMS and len(args) == 2 and not kwargs else None
    if not isinstance(other, torch.Tensor) or other.dtype != first.dtype or not other.is_meta:
        return None
    if name in IN_PLACE:
        return first if first.shape == other.shape else None
    sizes = list(zip(first.shape, other.shape, strict=False))
    if first.dim() != other.dim() or any(m != n and 1 not in (m, n) for m, n in sizes):
        return None
    return torch.empty([max(both) for both in sizes], dtype=first.dtype, device="meta")


def _joined(tensors: Any, dim: Any = 0, **other: Any) -> torch.Tensor | None:
    """What cat gives of plain images (B, C, H, W); None where torch is to see to it."""
    if type(tensors) is not list or not tensors or dim not in range(-4, 4) or other:
        return None
    first = tensors[0]
    if any(not t.is_meta or t.dim() != 4 or t.dtype != first.dtype for t in tensors):
        return None
    shapes = [list(tensor.shape) for tensor in tensors]
    total = sum(shape.pop(dim) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes):
        return None
    sizes = shapes[0]
    sizes.insert(dim % 4, total)
    return torch.empty(sizes, dtype=first.dtype, device="meta")


def _convolved(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor | None:
    """What conv2d gives of a plain image (B, C, H, W); None where torch is to see to it."""
    numbers = (stride, padding, dilation)
    fits = image.dim() == weight.dim() == 4 and image.shape[1] == weight.shape[1] * groups
    same = weight.is_meta and weight.dtype == image.dtype and image.is_contiguous()
    whole = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == image.dtype)
    if not (fits and same and whole and all(type(n) is tuple for n in numbers)):
        return None
    sizes = [
        (size + 2 * pad - far * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, far in zip(
            image.shape[2:], weight.shape[2:], *numbers, strict=True
        )
    ]
    shape = (len(image), len(weight), *sizes)
    return torch.empty(shape, dtype=image.dtype, device="meta") if min(sizes) > 0 else None


PLAIN = frozenset([torch.Tensor, nn.Parameter, int, float, bool, str, NoneType])


def _copied(value: Any) -> Any:
    """Lists as they are now: a network may go on appending to them."""
    if isinstance(value, (list, tuple)):
        parts = [part if type(part) in PLAIN else _copied(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return value


def _trace(
    network: nn.Module,
    example: Example,
    device: str | None,
    snapshot: Snapshot,
    training: bool,
) -> Trace:
    """One pass on copies of all tensors that the network keeps; others keep their numbers too."""
    batch = repeat_first_sample(example, BATCH)
    if device:
        batch = map_tensors(batch, lambda tensor: torch.empty_like(tensor, device=device))
    else:  # sizes alone may be known of an example
        weight = next(network.parameters(), torch.empty(0))
        batch = map_tensors(
            batch, lambda t: torch.rand_like(t, device=weight.device) if t.is_meta else t
        )
    places = snapshot.places
    made = snapshot.shadows if device else None  # without numbers: nothing can change in them
    copies, names = made or _copies(network, places, device)
    if device:
        snapshot.shadows = copies, names
    rest = [tensor for tensor in snapshot.tensors if id(tensor) not in copies]
    if device is None:
        snapshot.keep(t for t in rest if not isinstance(t, nn.Parameter))
    tracer, new = _Tracer(), list[torch.Tensor]()
    try:
        for store, key, tensor in places:
            store[key] = copies[id(tensor)]
        with training_mode(network, training=training), torch.no_grad(), tracer:
            outputs = call_network(network, batch)
    finally:
        for store, key, tensor in places:
            with suppress(LookupError):
                if store[key] is copies[id(tensor)]:
                    store[key] = tensor
        new += snapshot.restore()
    kept = {*map(id, copies.values()), *map(id, rest), *map(id, new)}
    return Trace(
        tracer.ops,
        names,
        frozenset(kept),
        list(tensors_of_inputs(batch)),
        sample_count(batch),
        list(tensors_in(outputs)),
        tracer.measured,
    )


def _copies(
    network: nn.Module, places: Sequence[Place], device: str | None
) -> tuple[dict[int, torch.Tensor], dict[int, str]]:
    """Copies of tensors by id of the original, and the names of those that have one, by id."""
    copies: dict[int, torch.Tensor] = {}
    named = list(tensors_of(network))
    ids = {id(tensor) for *_, tensor in named}
    for _, _, tensor in places:
        if id(tensor) not in copies:
            numbers = id(tensor) not in ids and not tensor.is_floating_point()  # as indices
            copies[id(tensor)] = _copy(tensor, None if numbers else device)
    names = {id(copies.get(id(t), t)): name for name, *_, t in reversed(named)}
    return copies, names


def _copy(tensor: torch.Tensor, device: str | None) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if device else tensor.detach().clone()
