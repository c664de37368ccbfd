"""Ops that change the shape of a tensor in place, traced like those that return a new tensor.

The ops before keep a view of the tensor with the shape that it had.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from job.slimming.inputs import map_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from job.slimming.graph.trace import Op

RESHAPING_IN_PLACE = frozenset("unsqueeze_ squeeze_ transpose_ t_ swapaxes_ swapdims_".split())


def before_reshaping(ops: Sequence[Op], tensor: torch.Tensor) -> tuple[list[Op], torch.Tensor]:
    """Return ``ops`` with a view in place of ``tensor``, whose shape is about to change; the view.

    The tensor itself stands for the result of the change.
    """
    view = tensor.view_as(tensor)
    return [_with_view(op, tensor, view) for op in ops], view


def _with_view(op: Op, tensor: torch.Tensor, view: torch.Tensor) -> Op:
    if not any(each is tensor for each in (*op.inputs, *op.results)):
        return op
    exchange = partial(map_tensors, change=lambda each: view if each is tensor else each)
    fields: dict[str, Any] = {
        name: exchange(getattr(op, name))
        for name in ("args", "kwargs", "result", "inputs", "results")
    }
    return replace(op, **fields)
