"""Comparison of the traces of two passes, as in eval and in train mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from job.slimming.graph.trace import Op, Trace

SCALARS = frozenset([int, float, str, slice, torch.device])


def same_ops(one: Trace, other: Trace) -> bool:
    """Return whether two traces have the same ops, apart from flags such as ``training``."""

    def same(first: Any, second: Any) -> bool:
        kind = type(first)
        if kind is not type(second):
            return False
        if isinstance(first, torch.Tensor):
            return one.name(first) == other.name(second)
        if isinstance(first, (list, tuple)):
            return len(first) == len(second) and all(map(same, first, second))
        return kind is bool or first is second or (kind in SCALARS and bool(first == second))

    def same_op(a: Op, b: Op) -> bool:
        if a.name != b.name:
            return False
        if a.name == "batch_norm":  # momentum is passed only in train mode
            return same(a.args[:3], b.args[:3])
        return same(a.args, b.args) and same(list(a.kwargs.items()), list(b.kwargs.items()))

    first, second = one.without_counters(), other.without_counters()
    return len(first) == len(second) and all(map(same_op, first, second))
