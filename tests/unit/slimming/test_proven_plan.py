"""A cut that proves wrong is planned again without the groups that make it wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import job
from job.errors import WrongCutError
from job.slimming import proven_plan
from job.slimming.analysis import analyse
from job.slimming.surgery import trial_cuts
from support.cuts import randomise
from support.masked import masked_network

IMAGE = torch.rand(1, 3, 12, 12)


class Branching(nn.Module):
    """Code that does something else for some numbers of channels, which no trial cut tries."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.numbers = numbers
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.second, self.last = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last(self.second(x * 2 if x.shape[1] in self.numbers else x).relu())


@pytest.mark.parametrize("images", [0, 32])
def test_a_group_that_makes_the_cut_wrong_is_blocked(images: int) -> None:
    torch.manual_seed(0)
    wide = randomise(Branching((7, 8, 9))).double()
    calibration = {"calibration": [torch.rand(images, 3, 12, 12)]} if images else {}
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", **calibration)
    assert (narrow.first.out_channels, narrow.second.out_channels) == (16, 8)
    blocked = {b.layer: b for b in plan.blocked}
    assert blocked["first"].reason == (
        "code that reads their number works only for the current number of channels"
    )
    assert plan.proof is not None
    if not images:
        x = torch.rand(3, 3, 12, 12, dtype=torch.float64)
        torch.testing.assert_close(narrow(x), masked_network(wide, plan.layers)(x))


def test_a_cut_that_stays_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the trial cuts find to be wrong explains it."""
    wide = randomise(Branching(()))
    monkeypatch.setattr(proven_plan, "apply_plan", lambda network, _: network)
    with pytest.raises(WrongCutError):
        job.slim(wide, IMAGE, policy="uniform", target="width=0.5")


class Magnifying(nn.Module):
    """The small difference of large sums, which makes rounding ten million times larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(432, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1)).relu()
        return self.last(self.second(x + 1e7) - self.second(x * 0 + 1e7))


def test_rounding_that_the_network_magnifies_is_no_difference() -> None:
    torch.manual_seed(0)
    _, plan = job.slim(
        Magnifying().eval(), IMAGE, policy="uniform", target="width=0.5", importance="l2"
    )
    assert plan.proof is not None
    assert 1e-9 < plan.proof.error <= plan.proof.tolerance <= 1e-6
    assert "in float64" in str(plan.proof)


class Halved(nn.Module):
    """Halves by an attribute, or by a number where ``literal``."""

    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.half, self.literal = 8, literal
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.second, self.last = nn.Conv2d(8, 12, 3), nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = x[:, :8] * x[:, 8:] if self.literal else x[:, : self.half] * x[:, self.half :]
        return self.last(self.second(x).relu())


@pytest.mark.parametrize("images", [0, 16])
def test_a_proof_makes_trial_cuts_unnecessary(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With calibration images planning takes long, so that suspects are tried before it."""
    torch.manual_seed(0)
    wide, trials = randomise(Halved()).double(), []
    verify = trial_cuts.verify
    monkeypatch.setattr(trial_cuts, "verify", lambda *a: trials.append(a) or verify(*a))
    calibration = {"calibration": [torch.rand(images, 3, 12, 12)]} if images else {}
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", **calibration)
    assert (narrow.first.out_channels, narrow.half, bool(trials)) == (8, 4, bool(images))
    assert {b.layer for b in plan.blocked} == {"last"}
    if not images:
        x = torch.rand(3, 3, 12, 12, dtype=torch.float64)
        torch.testing.assert_close(narrow(x), masked_network(wide, plan.layers)(x))


def test_what_a_plan_without_trial_cuts_leaves_is_what_trial_cuts_find() -> None:
    torch.manual_seed(0)
    wide = randomise(Halved(literal=True))
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5")
    assert (narrow.first.out_channels, narrow.second.out_channels) == (16, 6)
    assert plan.blocked == analyse(wide, IMAGE).blocked
    assert next(b for b in plan.blocked if b.layer == "first").place
