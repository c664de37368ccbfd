"""An op and a kind of layer are each added by one entry of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from job.errors import GammaslimError
from job.slimming.analysis import analyse
from job.slimming.graph.layer_rules import LAYER_RULES, LayerRule
from job.slimming.graph.op_rules import OP_RULES, elementwise
from job.slimming.planning.plan import keep_all, layers_of
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify
from support.cuts import randomise
from support.networks import Net, block

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op
    from job.slimming.planning.layer_channels import Layers

IMAGE = torch.rand(1, 3, 20, 28)


class Bessel(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return torch.i0(x)


class Projection(nn.Module):
    """A matrix (inputs, outputs) that is multiplied with the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(x, self.weight, ([1], [0])).movedim(-1, 1)


class Projected(Net):
    def build(self) -> None:
        self.project, self.after = Projection(12, 10), block(10, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.project(x))


def projection(state: PropagationState, op: Op) -> None:
    image, weight = op.args[:2]
    ids, name = state.ids_along(image, 1), state.trace.name(weight)
    assert ids is not None
    assert name is not None
    state.add_slot(name, "in", ids)
    produced = state.union.produce(name.removesuffix(".weight"), weight.shape[1])
    state.add_slot(name, "out", produced)
    state.set_ids(op.result, produced, op.result.dim() - 1)


PROJECTION = LayerRule(
    types=(Projection,),
    ops=("tensordot",),
    propagate=projection,
    tensors={"weight": ("in", "out")},
    sizes={"inputs": "in", "outputs": "out"},
)


def blocked(network: nn.Module) -> dict[str, str]:
    return {each.layer: each.reason for each in analyse(network, IMAGE).blocked}


def cut(network: nn.Module) -> tuple[nn.Module, Layers]:
    """Cut a third of each group, and prove it."""
    graph = analyse(network, IMAGE)
    keep = keep_all(graph)
    for group in graph.groups:
        keep[group.channels[::3]] = False
    layers = layers_of(graph, keep)
    narrow = apply_plan(network, layers)
    assert verify(network, narrow, layers, IMAGE, graph).error <= 1e-9
    return narrow, layers


def test_an_op_is_added_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(Bessel())
    assert blocked(network)["stem.0"] == "i0 is not supported"
    (each,) = (b for b in analyse(network, IMAGE).blocked if b.layer == "stem.0")
    line = Bessel.body.__code__.co_firstlineno + 1
    assert each.place == f"test_rules.py:{line}"
    monkeypatch.setitem(OP_RULES, "i0", elementwise)
    assert "stem.0" not in blocked(network)
    narrow, _ = cut(network)
    assert narrow.head.in_features == 8


def test_a_kind_of_layer_is_added_by_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(Projected())
    assert blocked(network)["stem.0"] == "tensordot is not supported"
    monkeypatch.setattr("job.slimming.graph.layer_rules.LAYER_RULES", [*LAYER_RULES, PROJECTION])
    monkeypatch.setattr("job.slimming.graph.propagation.LAYER_RULES", [*LAYER_RULES, PROJECTION])
    narrow, layers = cut(network)
    assert (narrow.project.inputs, narrow.project.outputs) == (8, 6)
    assert narrow.project.weight.shape == (8, 6)
    assert {"project", "after.0"} <= layers.keys()


class Flipped(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.flip(1)


def test_a_wrong_rule_is_found_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OP_RULES, "flip", elementwise)
    with pytest.raises(GammaslimError, match="the cut is wrong"):
        cut(randomise(Flipped()))
