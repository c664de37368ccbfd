"""The tables of criteria, compensations and policies: complete, and open to new entries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

import job
from job.config import CompensationName, ImportanceName, PolicyName
from job.errors import UsageError
from job.slimming.compensation.methods import COMPENSATIONS, Compensation
from job.slimming.importance.criteria import CRITERIA
from job.slimming.importance.scores import Criterion
from job.slimming.planning.policies import POLICIES, Policy
from support.commands import ROOT
from support.cuts import randomise
from support.networks import Residual

EXAMPLE = torch.rand(1, 3, 24, 24)
IMAGES = torch.rand(8, 3, 24, 24)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Residual())


@pytest.mark.parametrize(
    ("table", "names"),
    [(CRITERIA, ImportanceName), (COMPENSATIONS, CompensationName), (POLICIES, PolicyName)],
    ids=["importance", "compensation", "policy"],
)
def test_each_name_of_the_configuration_has_an_entry(table: Mapping[str, Any], names: Any) -> None:
    assert sorted(table) == sorted(get_args(names))
    assert all(entry.help for entry in table.values())


@pytest.mark.parametrize(
    ("table", "option"), [(CRITERIA, "importance"), (COMPENSATIONS, "compensate")]
)
def test_the_manual_says_what_each_entry_needs(table: Mapping[str, Any], option: str) -> None:
    manual = (ROOT / "job" / "README.md").read_text()
    _, _, rows = manual.partition(f"| `--{option}` |")
    rows = rows.partition("\n\n")[0]
    needs = dict(re.findall(r"^\| `(\w+)`.*\| ?(.*?) ?\|$", rows, re.M))
    expected = {
        name: ", ".join(need for need in ("images", "labels") if getattr(entry, need, False))
        for name, entry in table.items()
    }
    assert needs == expected


def test_a_new_criterion_is_used(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def last_channels_matter(inputs: Any) -> np.ndarray:
        given.append((inputs.calibration.statistics, torch.is_grad_enabled()))
        return np.arange(inputs.graph.count, dtype=float)

    with pytest.raises(UsageError, match="importance must be one of gamma, "):
        job.slim(network, EXAMPLE, importance="last")
    entry = Criterion(last_channels_matter, "a test", images=True, statistics=True, gradients=True)
    monkeypatch.setitem(CRITERIA, "last", entry)
    with pytest.raises(UsageError, match="importance last: calibration images are needed"):
        job.slim(network, EXAMPLE, importance="last", compensate="none")
    narrow, plan = job.slim(network, EXAMPLE, importance="last", calibration=[IMAGES])
    assert plan.method == "importance last, compensation regress, allocation outputs"
    ((statistics, grad_enabled),) = given
    assert statistics
    assert grad_enabled
    for name, kept in plan.groups.items():  # the last channels stay
        assert max(kept) - min(kept) == len(kept) - 1, name
    assert narrow(EXAMPLE).isfinite().all()


def test_a_criterion_that_needs_labels_asks_for_them(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Criterion(lambda inputs: np.ones(inputs.graph.count), "a test", True, labels=True)
    monkeypatch.setitem(CRITERIA, "labels", entry)
    with pytest.raises(
        UsageError, match=r"importance labels needs calibration images with labels \(B,\)"
    ):
        job.slim(network, EXAMPLE, importance="labels")


def test_a_new_compensation_is_used(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def negate_the_head(pair: Any, *_: object) -> None:
        with torch.no_grad():
            for parameter in pair.narrow.head.parameters():
                parameter.neg_()

    monkeypatch.setitem(COMPENSATIONS, "negate", Compensation(negate_the_head, "a test"))
    plain, _ = job.slim(network, EXAMPLE, importance="gamma", compensate="none")
    narrow, plan = job.slim(network, EXAMPLE, importance="gamma", compensate="negate")
    torch.testing.assert_close(narrow(IMAGES), -plain(IMAGES))
    assert plan.method == "importance gamma, compensation negate"


def test_a_new_policy_is_used(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_first_group(planner: Any, _: object) -> Any:
        sizes = [len(ranked.units) for ranked in planner.groups]
        return planner.plan([sizes[0] // 2, *sizes[1:]], 1.0)

    monkeypatch.setitem(POLICIES, "first", Policy(only_the_first_group, "a test"))
    _, plan = job.slim(network, EXAMPLE, policy="first")
    assert plan.policy == "first"
    _, full = job.slim(network, EXAMPLE, policy="uniform", target="width=1")
    lost = [len(full.groups[name]) - len(kept) for name, kept in plan.groups.items()]
    assert lost[0] > 0
    assert not any(lost[1:])
