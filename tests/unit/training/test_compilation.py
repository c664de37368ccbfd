"""--compile: the same steps by compiled code, compiled once a round."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from job.errors import UsageError
from job.training.compilation import CACHE, CompiledNetwork, fast_matmul
from job.training.session import RoundSpec
from support.training import trainer

COMPILE = torch.compile


class Compiler:
    """A backend of torch.compile that runs the graph as it is, and keeps the sizes of batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.sizes += [len(value) for value in inputs if tuple(value.shape[1:]) == (3, 32, 32)]
        return graph.forward


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    backend = Compiler()
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=backend))
    return backend


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.parametrize(("options", "sizes"), [({}, [16]), ({"accumulate": 3}, [6, 5])])
def test_full_batches_are_compiled_once_a_round_and_the_weights_are_the_same(
    tmp_path: Path, compiler: Compiler, options: dict[str, Any], sizes: list[int]
) -> None:
    network = small_network()
    weights = []
    for chosen in (False, True):
        trained = copy.deepcopy(network)
        trainer(tmp_path / str(chosen), compile=chosen, optimizer="sgd", **options).fit(
            trained, RoundSpec(0, 2)
        )
        weights.append(trained.state_dict())
        assert compiler.sizes == (sizes if chosen else [])  # the last batch, of 10, is not compiled
    plain, compiled = weights
    assert list(plain) == list(compiled)
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, atol=1e-5, rtol=1e-4, msg=key)


@torch._dynamo.config.patch(recompile_limit=2)  # 8 by default
def test_every_round_compiles_its_network(tmp_path: Path, compiler: Compiler) -> None:
    """torch.compile would run networks of a class beyond its limit uncompiled, without an error."""
    training, rounds = trainer(tmp_path, compile=True), 4
    for number in range(rounds):
        training.fit(small_network(), RoundSpec(number, 1))
    assert compiler.sizes == rounds * [16]


def test_a_trial_compiles_only_where_it_is_asked_to(tmp_path: Path, compiler: Compiler) -> None:
    """A dry run tries a step of every round, and compiles the base."""
    training = trainer(tmp_path, compile=True)
    training.try_step(small_network(), compiled=False)
    assert compiler.sizes == []
    training.try_step(small_network())
    assert compiler.sizes == [16]


def test_a_missing_compiler_is_an_error_that_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=broken))
    with pytest.raises(UsageError, match=r"--compile does not work here: .*no working C\+\+.*out"):
        trainer(tmp_path, compile=True).try_step(small_network())


def test_compiled_code_is_kept_on_the_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("SLURM_TMPDIR", "")
    CompiledNetwork(small_network(), {4})
    assert not os.environ.get(CACHE, "").startswith(str(tmp_path))  # torch's own folder
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    monkeypatch.setenv(CACHE, str(tmp_path / "mine"))
    CompiledNetwork(small_network(), {4})
    assert os.environ[CACHE] == str(tmp_path / "mine")
    monkeypatch.delenv(CACHE)
    CompiledNetwork(small_network(), {4})
    assert os.environ.pop(CACHE) == str(tmp_path / "torchinductor")


def test_matrices_are_multiplied_in_tf32_only_in_training() -> None:
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_tf32
    with fast_matmul(torch.device("cpu")):
        assert not matmul.allow_tf32
    with fast_matmul(torch.device("cuda")):
        assert matmul.allow_tf32
    assert not matmul.allow_tf32
