"""Within an epoch nothing waits for the device: the number of waits does not grow with batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from job.training.session import RoundSpec
from job.training.trainer import Trainer
from support.training import trainer

# ops whose result, or its shape, a CPU needs to know before it continues: on a GPU they wait
WAITING = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Counts the calls that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = args[1] if name == "index" else ()
        if name in WAITING or any(m is not None and m.dtype == torch.bool for m in masks):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 4))


def training(folder: Path, batches: int, **options: Any) -> Trainer:
    """A trainer with so many batches per epoch, and as many of evaluation as images."""
    training = trainer(folder, **options)
    sampler = training.sampler
    sampler.batch_size, sampler.batches = 90 // batches, batches
    return training


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "accumulate": 2},
        {"sparsity": "l1", "sparsity_epochs": 1},
        {"sparsity": "polarize", "sparsity_epochs": 1},
    ],
)
def test_steps_do_not_wait(tmp_path: Path, options: dict[str, Any]) -> None:
    calls = []
    for batches in (2, 6):
        each = training(tmp_path / str(batches), batches, **options)
        sparse = options.get("sparsity_epochs", 0)
        spec = RoundSpec(0, 1, sparse_epochs=sparse)
        with Waits() as waits:
            each.fit(network(), spec)
        calls.append(waits.calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("lenient", [False, True])
def test_evaluation_does_not_wait(tmp_path: Path, lenient: bool) -> None:
    evaluator = trainer(tmp_path).evaluator
    object.__setattr__(evaluator.split, "__class__", _kind(type(evaluator.split), lenient))
    calls = []
    for size in (30, 3):
        evaluator.batches.sampler.batch_size = size
        with Waits() as waits:
            evaluator(network())
        calls.append(waits.calls)
    assert calls[0] == calls[1]


def _kind(kind: type, lenient: bool) -> type:
    return type(kind.__name__, (kind,), {"lenient": lenient})


def test_the_counter_counts() -> None:
    values = torch.tensor([1.0, 0.0])
    with Waits() as waits:
        values.sum().item()
        assert bool((values >= 0).all())
        values[values > 0]
        torch.bincount(values.long())
    assert waits.calls == ["_local_scalar_dense", "_local_scalar_dense", "index", "bincount"]
