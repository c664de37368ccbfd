"""Remedies: what is not cut names the line of code, and the change that would free it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import job
from job.slimming.analysis import analyse
from job.slimming.graph.remedies import REMEDIES, remedy_of
from support.cuts import randomise
from support.networks import Net, block

IMAGE = torch.rand(1, 3, 16, 16)
NO_CHANGE = {"the network's output", "channels are selected before each BatchNorm that reads them"}
SLIMMING = Path(job.__file__).parent / "slimming"
GIVING = {"give_up": 1, "fix": 1, "without": 1}  # functions, and the position of the reason
NAMED = {"reason", "OVERLAP", "FIXED_PARTS", "COMPUTED"}  # names of reasons


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.expr) -> str | None:
    """The text of a literal, with the name of an op for its values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else "some_op" for p in node.values]
        return "".join(map(str, parts))
    return None


def _reasons() -> list[str]:
    reasons = set()
    for path in (*(SLIMMING / "graph").glob("*.py"), *(SLIMMING / "surgery").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                place = GIVING.get(node.func.attr)
                given = node.args[place : place + 1] if place is not None else []
                reasons |= {text for arg in given if (text := _text(arg))}
            if isinstance(node, ast.Assign) and _name(node.targets[0]) in NAMED:
                reasons |= {text} if (text := _text(node.value)) else set()
    return sorted(reasons)


def test_each_reason_of_a_rule_has_a_remedy() -> None:
    reasons = _reasons()
    assert len(reasons) > 40
    assert [r for r in reasons if not remedy_of(r) and r not in NO_CHANGE] == []


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
    assert remedy in remedy_of(reason)
    assert bool(remedy) == bool(remedy_of(reason))


def test_remedies_are_one_line_each() -> None:
    assert all("\n" not in remedy and not remedy.endswith(".") for _, remedy in REMEDIES)


class Counted(Net):
    """A view to a number that is written in the code."""

    out = 8

    def build(self) -> None:
        self.one, self.last = block(12, 16), nn.Linear(256, 8)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.one(x), 4)
        return self.last(x.view(-1, 16 * 4 * 4))[:, :, None, None]


def test_a_view_to_a_number_names_its_line_and_what_to_write() -> None:
    line = f"test_remedies.py:{Counted.body.__code__.co_firstlineno + 2}"
    network = randomise(Counted())
    (each,) = (b for b in analyse(network, IMAGE).blocked if b.layer == "one.0")
    assert each.place == line
    assert each.explanation == (
        f"view works only for the current number of channels ({line}); to cut them: "
        f"{remedy_of(each.reason)}"
    )
    _, plan = job.slim(network, IMAGE, target="width=0.5", policy="uniform", compensate="none")
    assert f"not cut: 16 channels: {each.explanation}" in str(plan)
