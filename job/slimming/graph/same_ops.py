"""Comparison of the traces of two passes, as in eval and in train mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from job.slimming.graph.trace import Op, Trace

SCALARS = frozenset([int, float, str, slice, torch.device])
DRAWING = frozenset("empty new_empty full new_full rand bernoulli bernoulli_ uniform_".split())
COMPUTING = frozenset("add add_ sub mul mul_ div div_ floor floor_".split())
SCALING = frozenset("mul mul_ div div_".split())


def same_ops(one: Trace, other: Trace) -> bool:
    """Return whether two traces have the same ops, apart from flags such as ``training``.

    The noise by which drop path scales whole samples in train mode is left out. It has no channels.
    """

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

    first, second = _without_sample_noise(one), _without_sample_noise(other)
    return len(first) == len(second) and all(map(same_op, first, second))


def _without_sample_noise(trace: Trace) -> list[Op]:
    """Return the ops except counters, draws of a number a sample, and products with numbers.

    Stochastic depth (Huang et al. 2016) multiplies the result of a branch by such draws.
    """
    ops, noise = [], set[int]()
    for op in trace.without_counters():
        values = [id(t) for t in op.inputs if id(t) not in noise]
        if _is_sample_noise(op, values):
            noise.update(map(id, op.results))
        elif not (op.name in SCALING and (len(values) < len(op.inputs) or len(op.inputs) == 1)):
            ops.append(op)
    return ops


def _is_sample_noise(op: Op, values: list[int]) -> bool:
    """Return whether ``op`` draws, or computes from draws, one number for each sample, or one."""
    drawn = op.name in DRAWING and (not values or op.name.startswith("new_"))
    if not drawn and not (op.name in COMPUTING and op.inputs and not values):
        return False
    return all(result.shape.numel() == result.shape[:1].numel() for result in op.results)
