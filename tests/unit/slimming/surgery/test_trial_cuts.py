"""Trial cuts: which suspects stay blocked, and how many trials that takes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from job import GammaslimError
from job.slimming.analysis import analyse
from job.slimming.surgery import trial_cuts, verification
from job.slimming.surgery.clone import clone_module
from support.cuts import randomise

BLOCKS = 12


class Right(nn.Module):
    """A view by an attribute, which a cut rewrites."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.back = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu()
        return x + self.back(y.view(-1, self.channels, y.shape[2] * y.shape[3]).view_as(y))


class Wrong(Right):
    """A view by a number, which works for the wide network alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu()
        return x + self.back(y.view(-1, 12, y.shape[2] * y.shape[3]).view_as(y))


LINE = f"test_trial_cuts.py:{Wrong.forward.__code__.co_firstlineno + 2}"


def network_of(*blocks: type[Right]) -> nn.Module:
    torch.manual_seed(0)
    layers = [block(12) for block in blocks]
    return randomise(nn.Sequential(nn.Conv2d(3, 12, 1), *layers, nn.Flatten(), nn.Linear(192, 4)))


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of groups of each trial cut."""
    counts: list[int] = []
    failure = trial_cuts._Trials.failure

    def counted(self: object, names: list[str], quick: bool = False) -> Exception | None:
        counts.append(len(names))
        return failure(self, names, quick)  # type: ignore[arg-type]

    monkeypatch.setattr(trial_cuts._Trials, "failure", counted)
    return counts


@pytest.mark.parametrize("wrong", [(), (0,), (5,), (2, 3, 9), tuple(range(BLOCKS))])
def test_the_wrong_suspects_are_blocked_and_no_others(
    wrong: tuple[int, ...], trials: list[int]
) -> None:
    network = network_of(*[Wrong if number in wrong else Right for number in range(BLOCKS)])
    graph = analyse(network, torch.rand(1, 3, 4, 4))
    cut = {int(group.name.split(".")[0]) - 1 for group in graph.groups if "conv" in group.name}
    assert cut == set(range(BLOCKS)) - set(wrong)
    assert {b.place for b in graph.blocked if "conv" in b.layer} == ({LINE} if wrong else set())
    assert len(trials) <= 6 + 2 * len(wrong)  # by halves alone, 33 for the first block


def test_a_trial_for_which_memory_is_short_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B")

    network = network_of(Right, Wrong)
    monkeypatch.setattr(verification, "set_exact_constants", short)
    with pytest.raises(GammaslimError, match="not enough memory to verify the cut: Default"):
        analyse(network, torch.rand(1, 3, 4, 4))


def test_copies_for_the_proof_are_freed_at_once() -> None:
    network = network_of(Right)
    gc.disable()
    try:
        copy = weakref.ref(clone_module(network, {}))
        assert copy() is None
    finally:
        gc.enable()
