"""Reasons: what is not cut names the line of code, and the change that would free it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import job
from job import UsageError
from job.slimming.analysis import analyse
from job.slimming.graph import reasons
from job.slimming.graph.groups import BlockedChannels
from job.slimming.graph.op_rules import OP_RULES
from job.slimming.graph.reasons import KINDS, Reason, ReasonKind, read_reason
from support.cuts import randomise
from support.networks import Net, block

IMAGE = torch.rand(1, 3, 16, 16)
NO_CHANGE = [
    reasons.OUTPUT, reasons.NO_CHANNELS_OF_ITS_OWN, reasons.HIDDEN, reasons.SELECTION,
    reasons.UNRANKED,
]  # fmt: skip
SLIMMING = Path(job.__file__).parent / "slimming"
NAMES = ("view", "split", "softmax", "sinc", "einsum", "weight_norm", "a pruning mask", "a.scale")


@pytest.mark.parametrize("kind", [Reason, ReasonKind])
def test_a_reason_does_not_exist_without_a_remedy(kind: type) -> None:
    with pytest.raises(TypeError, match="'remedy'"):
        kind("sinc is not supported")
    with pytest.raises(TypeError, match="'remedy'"):
        BlockedChannels("conv", 8, "sinc is not supported", "")  # type: ignore[call-arg]


def test_each_kind_of_reason_has_a_remedy() -> None:
    assert len(KINDS) > 40
    assert [kind for kind in KINDS if not kind.remedy] == NO_CHANGE
    remedies = [remedy for kind in KINDS for remedy in (kind.remedy, *kind.remedies.values())]
    assert all("\n" not in remedy and not remedy.endswith(".") for remedy in remedies)


def test_each_kind_of_reason_is_given_somewhere() -> None:
    """And a reason is made of a kind, in no other way."""
    code = {path: path.read_text("utf-8") for path in SLIMMING.rglob("*.py")}
    del code[Path(inspect.getfile(reasons))]
    nodes = [node for text in code.values() for node in ast.walk(ast.parse(text))]
    calls = [n.func for n in nodes if isinstance(n, ast.Call)]
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    named = {name for name, kind in vars(reasons).items() if isinstance(kind, ReasonKind)}
    assert named - called == set()
    assert "Reason" not in called


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.text)
def test_the_reason_of_a_saved_plan_has_its_remedy(kind: ReasonKind) -> None:
    for name in NAMES if "{}" in kind.text else ("",):
        for reason in (kind(name), kind(name).in_train_mode()):
            assert read_reason(reason.text) == reason


def test_a_reason_of_another_version_is_kept() -> None:
    assert read_reason("an older reason") == Reason("an older reason", "")


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("view works only for the current number of channels", "x.flatten(1) in place of"),
        ("split works only for the current number of channels", "x.split((self.first"),
        ("the parameter a.scale works only for the current number of channels", "use a.scale on"),
        ("two axes of a.table", "each axis of a.table"),
        ("a weight that is computed by weight_norm", "utils.remove_weight_norm(layer) before"),
        ("a weight that is computed by a pruning mask", "prune.remove(layer, 'weight') before"),
        ("a weight that is computed by a parametrization", "remove_parametrizations(layer, "),
        ("embedding uses its weight too", "give embedding a parameter"),
        ("layers of the kind Odd are not supported", "a rule for Odd"),
        ("softmax across channels is not supported", "another axis"),
        ("softmax across channels is not supported (in train mode)", "another axis"),
        ("sinc is not supported", "ops that have a rule"),
        ("mean over all axes is not supported", "x.mean((2, 3))"),
        ("asked to be ignored", "leave it out"),
        ("the network's output", ""),
    ],
)
def test_a_remedy_says_what_to_write(reason: str, remedy: str) -> None:
    assert remedy in read_reason(reason).remedy
    assert bool(remedy) == bool(read_reason(reason).remedy)


class Counted(Net):
    """A view to a number that is written in the code."""

    out = 8

    def build(self) -> None:
        self.one, self.last = block(12, 16), nn.Linear(256, 8)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.one(x), 4)
        return self.last(x.view(-1, 16 * 4 * 4))[:, :, None, None]


def test_a_view_to_a_number_names_its_line_and_what_to_write() -> None:
    line = f"test_reasons.py:{Counted.body.__code__.co_firstlineno + 2}"
    network = randomise(Counted())
    (each,) = (b for b in analyse(network, IMAGE).blocked if b.layer == "one.0")
    assert each.place == line
    assert each.explanation == (
        f"view works only for the current number of channels ({line}); to cut them: {each.remedy}"
    )
    _, plan = job.slim(network, IMAGE, target="width=0.5", policy="uniform", compensate="none")
    assert f"not cut: 16 channels: {each.explanation}" in str(plan)


def test_a_fault_in_a_rule_leaves_the_rest_of_the_network_to_be_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def faulty(*_: object) -> None:
        raise KeyError("axis")

    monkeypatch.setitem(OP_RULES, "sigmoid", faulty)
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 4, 1)
    narrow, plan = job.slim(
        nn.Sequential(*layers), IMAGE, policy="uniform", target="width=0.5", importance="l2"
    )
    assert (narrow[0].out_channels, narrow[2].out_channels) == (4, 6)
    (blocked,) = (b for b in plan.blocked if b.layer == "2")
    assert blocked.explanation.startswith("an error of Gammaslim in sigmoid: 'axis'")
    assert "report it as a defect" in blocked.explanation


def test_a_lack_of_memory_is_no_fault_of_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: object) -> None:
        raise MemoryError

    monkeypatch.setitem(OP_RULES, "sigmoid", hungry)
    with pytest.raises(UsageError, match="MemoryError"):
        analyse(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 1)), IMAGE)
