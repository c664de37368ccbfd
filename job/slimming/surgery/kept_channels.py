"""Ops that compute over channels without a weight, restricted to the kept channels."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from job.errors import GammaslimError
from job.slimming.graph.hidden_calls import scripted_functions_in_python
from job.slimming.inputs import map_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from job.slimming.graph.union import ChannelRead, Ids, Operand

SHAPE_ARGUMENT = frozenset({"layer_norm", "rms_norm"})  # the second argument is a shape


def groups_that_stay(groups: int, channels: int, kept: Sequence[int]) -> int:
    """Return the number of groups that a GroupNorm has for the channels ``kept``.

    Raises GammaslimError where its groups would have different sizes.
    """
    sizes = Counter(channel // (channels // groups) for channel in kept)
    if len(set(sizes.values())) != 1:
        raise GammaslimError("a cut of GroupNorm leaves its groups unequal")
    return len(sizes)


@dataclass(frozen=True)
class KeptReads:
    """Ops ``reads`` that compute over channels, and the mask ``keep`` (count,) of those to use."""

    reads: Sequence[ChannelRead]
    keep: Ids

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Return a context in which these ops compute from the kept channels of one pass."""
        with scripted_functions_in_python(), KeptChannelsOnly(self.reads, self.keep):
            yield


class KeptChannelsOnly(TorchFunctionMode):
    """Compute the ops ``reads`` of a network from the channels in the mask ``keep`` (count,) alone.

    Their results have zeros for the other channels. Ops are found by their name and the number of
    the call. Raises GammaslimError where such a call has inputs of other sizes than in the trace.
    """

    def __init__(self, reads: Iterable[ChannelRead], keep: Ids) -> None:
        super().__init__()
        self.reads = {(read.name, read.call): read for read in reads}
        self.keep, self.calls = keep, Counter[str]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        read = self.reads.get((name, self.calls[name]))
        self.calls[name] += 1
        if read is None or all(self.keep[operand.ids].all() for operand in read.operands):
            return func(*args, **kwargs)
        return self._from_kept(read, func, list(args), dict(kwargs))

    def _from_kept(
        self, read: ChannelRead, func: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        if read.zeroed:
            for operand in read.operands:
                kept = torch.from_numpy(self.keep[operand.ids])
                if operand.name == "attn_mask":
                    _set(args, kwargs, operand.position, operand.name, kept)
                    continue
                value = _get(args, kwargs, operand)
                if read.name == "softmax":
                    value = value.masked_fill(~kept, torch.finfo(value.dtype).min)
                else:
                    value = value * kept
                _set(args, kwargs, operand.position, operand.name, value)
            return func(*args, **kwargs)
        kept = torch.from_numpy(self.keep[read.operands[0].ids].nonzero()[0])
        size = len(read.operands[0].ids)
        if not len(kept):
            return map_tensors(func(*args, **kwargs), torch.zeros_like)
        if read.name == "group_norm":
            groups = args[1] if len(args) > 1 else kwargs["num_groups"]
            _set(args, kwargs, 1, "num_groups", groups_that_stay(groups, size, kept.tolist()))
        elif read.name in SHAPE_ARGUMENT:
            shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            _set(args, kwargs, 1, "normalized_shape", (len(kept), *shape[1:]))
        for operand in read.operands:
            value = _get(args, kwargs, operand)
            if value.shape[operand.axis] != len(operand.ids):
                raise GammaslimError(f"{read.name} has another size than in the trace")
            indices = torch.from_numpy(self.keep[operand.ids].nonzero()[0])
            value = value.index_select(operand.axis, indices)
            _set(args, kwargs, operand.position, operand.name, value)
        result = func(*args, **kwargs)
        if read.result_axis is None:
            return result
        shape = list(result.shape)
        shape[read.result_axis] = size
        return result.new_zeros(shape).index_copy(read.result_axis, kept, result)


def _get(args: list[Any], kwargs: dict[str, Any], operand: Operand) -> Any:
    return args[operand.position] if operand.position < len(args) else kwargs[operand.name]


def _set(args: list[Any], kwargs: dict[str, Any], position: int, name: str, value: Any) -> None:
    if position < len(args):
        args[position] = value
    else:
        kwargs[name] = value
