"""Plans that are saved, loaded, applied to other networks, and composed."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import job
import job.slimming.application
from job.errors import DataError, InputNotFound, OutputError, UsageError
from support.cuts import randomise
from support.networks import BareStream, Dense, Grouped, Halves, Norms, PreActivation, Residual

EXAMPLE = torch.rand(1, 3, 24, 24)


def small(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(kind(), seed)


@pytest.mark.parametrize("kind", [Residual, PreActivation, Dense, Grouped, Halves, Norms])
def test_a_saved_plan_makes_the_same_network_of_fresh_weights(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    narrow, plan = job.slim(small(kind), EXAMPLE, target="params=0.85")
    plan.save(tmp_path / "plan.json")
    loaded = job.Plan.load(tmp_path / "plan.json")
    assert str(loaded) == str(plan)
    assert loaded.layers == plan.layers
    assert (loaded.groups, loaded.proof, loaded.blocked) == (plan.groups, plan.proof, plan.blocked)
    other = small(kind, 1)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    same = job.apply(other, loaded)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    shapes = {key: value.shape for key, value in narrow.state_dict().items()}
    assert {key: value.shape for key, value in same.state_dict().items()} == shapes
    same.load_state_dict(narrow.state_dict())
    assert torch.equal(same(EXAMPLE), narrow(EXAMPLE))
    plain = job.apply(small(kind), loaded).state_dict()  # the weights that were cut
    assert all(torch.equal(value, plain[key]) for key, value in narrow.state_dict().items())


def test_a_plan_with_compensation_and_measured_latency_is_kept(tmp_path: Path) -> None:
    narrow, plan = job.slim(
        small(BareStream), EXAMPLE, compensate="mean", calibration=[torch.rand(8, 3, 24, 24)]
    )
    plan.save(tmp_path / "plan.json")
    same = job.apply(small(BareStream, 1), job.Plan.load(tmp_path / "plan.json"))
    same.load_state_dict(narrow.state_dict())


@pytest.mark.parametrize("kind", [Residual, PreActivation, Dense, BareStream])
def test_two_plans_are_one(kind: type[nn.Module]) -> None:
    network = small(kind)
    once, first = job.slim(network, EXAMPLE, target="params=0.8")
    twice, second = job.slim(once, EXAMPLE, target="params=0.8")
    both = first.then(second)
    assert (both.before, both.after) == (first.before, second.after)
    direct = job.apply(network, both)
    assert all(
        torch.equal(value, twice.state_dict()[key]) for key, value in direct.state_dict().items()
    )
    assert both.proof is None
    for name, kept in both.groups.items():
        assert set(kept) <= set(first.groups[name])


def test_examples_of_all_kinds_are_kept(tmp_path: Path) -> None:
    example = {"x": torch.rand(2, 3, 4), "more": [torch.tensor([[1, 2]]), (None, 1, 0.5, "a")]}
    plan = job.Plan("global", 0.5, {}, example=example)
    plan.save(tmp_path / "plan.json")
    kept = job.Plan.load(tmp_path / "plan.json").example
    assert kept["more"][0].tolist() == [[1, 2]]
    assert kept["more"][1] == (None, 1, 0.5, "a")
    job.Plan("global", 0.5, {}, example=object()).save(tmp_path / "other.json")
    assert job.Plan.load(tmp_path / "other.json").example is None


def test_plans_of_other_networks_are_refused() -> None:
    _, plan = job.slim(small(Residual), EXAMPLE)
    for model, message in (
        (small(Dense), "another network than the Dense given: one.0 has"),
        (nn.Conv2d(3, 4, 1), "another network than the Conv2d given: it has no layer"),
    ):
        with pytest.raises(UsageError, match=message):
            job.apply(model, plan)
    with pytest.raises(UsageError, match="plan must be a Plan, e"):
        job.apply(small(Residual), plan.layers)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the plan has no example: give one"):
        job.apply(small(Residual), job.Plan("", 1.0, {}))
    with pytest.raises(UsageError, match="does not run on images of 1 x 9 x 9"):
        job.apply(small(Residual), plan, torch.rand(1, 1, 9, 9))
    with pytest.raises(UsageError, match=r"later is not a plan of the network .* has \d+ outputs"):
        plan.then(plan)


def test_files_that_are_no_plan_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(InputNotFound, match="expected a file of plan"):
        job.Plan.load(path)
    _, plan = job.slim(small(Residual), EXAMPLE)
    plan.save(path)
    with pytest.raises(OutputError, match="already exists"):
        plan.save(path)
    content = json.loads(path.read_text())
    for change in (
        {"format": 2}, {"layers": {"stem.0": {"out": [2, 1]}}}, {"groups": {"stem.0": [-1]}},
        {"width": 0}, {"sizes": {"stem.0": ["a", 1]}}, {"before": {"channels": "many"}},
        {"example": {"shape": [1], "dtype": "no"}}, {"proof": {"error": 1}}, {"policy": 1},
        {"blocked": [1]},
    ):  # fmt: skip
        path.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match="plan"):
            job.Plan.load(path)
    for key in content:
        path.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(DataError, match=f"is not a plan: no '{key}'"):
            job.Plan.load(path)
    wrong: Any = 3
    with pytest.raises(UsageError, match="path must be a file; got 3"):
        plan.save(wrong)


def test_the_example_in_its_docstring_runs() -> None:
    failed, tried = doctest.testmod(job.slimming.application)
    assert (failed, tried) == (0, 6)
