"""Inferred shapes are those that torch computes; arguments that torch refuses are left to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from job.slimming.graph.shape_inference import SHAPE_RULES, infer_result
from job.slimming.inputs import map_tensors

X = torch.rand(2, 6, 8, 8)
TOKENS = torch.rand(2, 5, 6)
HEADS = torch.rand(2, 3, 5, 4)
DOUBLE = torch.float64
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
INFERRED: list[Call] = [
    (F.relu, (X,), {}),
    (torch.add, (X, X[:, :1]), {}),
    (torch.Tensor.mul, (X[:, :, :1, :1], X), {}),
    (torch.mul, (X, X[0, 0, 0]), {}),
    (torch.sub, (X[0, 0], X), {}),
    (torch.Tensor.__truediv__, (X, 2), {}),
    (torch.Tensor.__rsub__, (X, 0.5), {}),
    (torch.Tensor.add_, (X.clone(), X[:, :1]), {}),
    (torch.div, (X, X[:0, :, :, :1].sum(0)), {}),
    (F.dropout, (X, 0.1, True), {}),
    (F.group_norm, (X, 3, torch.rand(6), torch.rand(6)), {}),
    (F.prelu, (X, torch.rand(6)), {}),
    (F.prelu, (X, torch.rand(1)), {}),
    (torch.mean, (X, (2, -1)), {}),
    (torch.Tensor.mean, (X,), {"dim": 1, "keepdim": True}),
    (F.adaptive_avg_pool2d, (X, 1), {}),
    (torch.cat, ([X, X[:, :2]], 1), {}),
    (F.conv2d, (X, torch.rand(4, 3, 3, 3), torch.rand(4), (2, 1), (1, 0), (1, 2), 2), {}),
    (F.linear, (TOKENS, torch.rand(7, 6)), {}),
    (F.linear, (torch.rand(6), torch.rand(7, 6), torch.rand(7)), {}),
    (F.layer_norm, (TOKENS, (6,), torch.rand(6), torch.rand(6), 1e-6), {}),
    (F.layer_norm, (X, [8, 8]), {"weight": torch.rand(8, 8)}),
    (F.scaled_dot_product_attention, (HEADS, HEADS[:, :, :2], torch.rand(2, 3, 2, 9)), {}),
    (F.scaled_dot_product_attention, (HEADS, HEADS, HEADS), {"dropout_p": 0.1, "is_causal": True}),
    (F.interpolate, (X,), {"size": (3, 20), "mode": "bicubic", "antialias": True}),
    (F.interpolate, (X, [16, 16]), {}),
]
LEFT_TO_TORCH: list[Call] = [
    (torch.add, (X, X), {"alpha": 2}),
    (torch.add, (X, torch.tensor(1)), {}),
    (torch.div, (torch.ones(2, 3).long(), 2), {}),
    (torch.div, (X, 2), {"rounding_mode": "floor"}),
    (F.dropout, (X, 0.1, False), {}),
    (torch.mean, (X,), {}),
    (torch.mean, (X, 1), {"dtype": DOUBLE}),
    (F.adaptive_avg_pool2d, (X, (2, 1)), {}),
    (F.adaptive_avg_pool2d, (X[0], 1), {}),
    (F.linear, (TOKENS, torch.rand(6)), {}),
    (F.scaled_dot_product_attention, (HEADS,) * 3, {"attn_mask": torch.ones(5, 5).bool()}),
    (
        F.scaled_dot_product_attention,
        (HEADS, HEADS[:, :1], HEADS[:, :1]),
        {"enable_gqa": True},
    ),
    (F.scaled_dot_product_attention, (HEADS, HEADS[:1], HEADS[:1]), {}),
    (F.scaled_dot_product_attention, (HEADS, HEADS, HEADS[:, :, :2]), {}),
    (F.interpolate, (X,), {"scale_factor": 2}),
    (F.interpolate, (X, 16), {}),
]
INVALID: list[Call] = [
    (torch.add, (X, X[:, :2]), {}),
    (torch.Tensor.add_, (X[:, :1].clone(), X), {}),
    (F.group_norm, (X, 4), {}),
    (F.group_norm, (X, 3, torch.rand(5)), {}),
    (F.prelu, (X, torch.rand(5)), {}),
    (F.dropout, (X, 2.0), {}),
    (torch.mean, (X, (1, 1)), {}),
    (torch.mean, (torch.ones(2, 3).long(), 1), {}),
    (F.conv2d, (X, torch.rand(4, 5, 3, 3)), {}),
    (F.linear, (TOKENS, torch.rand(7, 5)), {}),
    (F.linear, (TOKENS, torch.rand(7, 6), torch.rand(6)), {}),
    (F.linear, (TOKENS, torch.rand(7, 6, dtype=DOUBLE)), {}),
    (F.layer_norm, (TOKENS, (5,)), {}),
    (F.layer_norm, (TOKENS, (6,), torch.rand(5)), {}),
    (F.scaled_dot_product_attention, (HEADS, HEADS.double(), HEADS), {}),
    (F.interpolate, (X,), {"size": (4, 4), "mode": "nearest", "align_corners": True}),
    (F.interpolate, (X[0], (4, 4)), {"mode": "bilinear"}),
]


def inferred(call: Call) -> torch.Tensor | None:
    function, args, kwargs = call
    args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to("meta"))
    return infer_result(function.__name__, args, kwargs)


@pytest.mark.parametrize("call", INFERRED, ids=lambda call: call[0].__name__)
def test_an_inferred_result_is_that_of_torch(call: Call) -> None:
    function, args, kwargs = call
    result, expected = inferred(call), function(*args, **kwargs)
    assert result is not None
    assert result.is_meta
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("call", LEFT_TO_TORCH, ids=lambda call: call[0].__name__)
def test_other_arguments_are_left_to_torch(call: Call) -> None:
    function, args, kwargs = call
    assert inferred(call) is None
    assert isinstance(function(*args, **kwargs), torch.Tensor)


@pytest.mark.parametrize("call", INVALID, ids=lambda call: call[0].__name__)
def test_arguments_that_torch_refuses_are_not_inferred(call: Call) -> None:
    function, args, kwargs = call
    assert inferred(call) is None
    with pytest.raises((RuntimeError, ValueError)):
        function(*args, **kwargs)


def test_results_with_values_are_never_inferred() -> None:
    for name in SHAPE_RULES:
        assert infer_result(name, (X,), {}) is None
