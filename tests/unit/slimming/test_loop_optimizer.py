"""Optimizers of a user's loop after a cut."""

from __future__ import annotations

import copy
import doctest
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import job
import job.slimming.loop_optimizer
from job.errors import UsageError
from job.slimming.graph.removed_layers import ConstantOutput
from support.cuts import randomise
from support.networks import BareStream, Grouped, Net, PreActivation, Residual, block
from support.removal import remove

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLE = torch.rand(1, 3, 16, 16)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "SGD plain": lambda p: torch.optim.SGD(p, 0.1),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3, foreach=False),
    "NAdam": torch.optim.NAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "ASGD": torch.optim.ASGD,
}


def trained(
    kind: type[nn.Module], make: Callable[[Any], torch.optim.Optimizer], steps: int = 2
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = randomise(kind())
    optimizer = make(network.parameters())
    for _ in range(steps):
        step(network, optimizer)
    return network, optimizer


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    network(torch.rand(4, 3, 16, 16)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [Residual, PreActivation, Grouped])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_cut_as_the_parameters_are(name: str, kind: type[nn.Module]) -> None:
    network, old = trained(kind, OPTIMIZERS[name])
    for parameter, state in old.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[key] = 2 * parameter.detach()  # so that the cut parameters tell what is right
    before = copy.deepcopy(old.state_dict())
    narrow, _ = job.slim(network, EXAMPLE)
    new = job.new_optimizer(old, narrow)
    assert (type(new), new.defaults) == (type(old), old.defaults)
    (group,), (wide,) = new.param_groups, old.param_groups
    assert {k: v for k, v in group.items() if k != "params"} == {
        k: v for k, v in wide.items() if k != "params"
    }
    assert list(map(id, group["params"])) == list(map(id, narrow.parameters()))
    sample = next(iter(old.state.values()), {})
    for parameter in group["params"] if old.state else ():
        assert set(new.state[parameter]) == set(sample)
        for key, value in new.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.dim():
                assert torch.equal(value, 2 * parameter.detach()), key
            else:
                assert value == sample[key]
    after = old.state_dict()
    assert str(after) == str(before)
    step(narrow, new)
    assert str(old.state_dict()) == str(after)  # nothing is shared


def test_groups_stay_aligned_and_the_parameters_of_other_modules_stay() -> None:
    torch.manual_seed(0)
    network, loss = randomise(Residual()), nn.Linear(5, 5)
    vectors = [p for p in network.parameters() if p.dim() < 2]
    others = [p for p in network.parameters() if p.dim() > 1]
    old = torch.optim.AdamW(
        [
            {"params": others, "lr": 1e-2},
            {"params": loss.parameters(), "lr": 1e-4, "tag": "loss"},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )
    step(nn.Sequential(network, loss), old)
    narrow, _ = job.slim(network, EXAMPLE)
    new = job.new_optimizer(old, narrow)
    assert [g["lr"] for g in new.param_groups] == [1e-2, 1e-4, 1e-3]
    assert new.param_groups[1]["tag"] == "loss"
    assert [id(p) for p in new.param_groups[1]["params"]] == [id(p) for p in loss.parameters()]
    assert all(p.dim() < 2 for p in new.param_groups[2]["params"])
    assert len(new.state) == len(list(narrow.parameters())) + 2
    step(nn.Sequential(narrow, loss), new)


def test_names_of_parameters_follow() -> None:
    torch.manual_seed(0)
    network = randomise(PreActivation())
    old = torch.optim.SGD(network.named_parameters(), 0.1, momentum=0.9)
    narrow, _ = job.slim(network, EXAMPLE)
    (group,) = job.new_optimizer(old, narrow).param_groups
    assert group["param_names"] == old.param_groups[0]["param_names"]


@pytest.mark.parametrize("make", [OPTIMIZERS["SGD"], torch.optim.Adagrad])
@pytest.mark.parametrize("split", [True, False])
def test_added_biases_join_the_group_of_vectors(make: Any, split: bool) -> None:
    torch.manual_seed(0)
    network = randomise(BareStream())
    groups = [list(network.parameters())]
    if split:
        groups = [[p for p in groups[0] if p.dim() > 1], [p for p in groups[0] if p.dim() < 2]]
    old = make([{"params": group} for group in groups])
    step(network, old)
    narrow, _ = job.slim(
        network, EXAMPLE, compensate="mean", calibration=[torch.rand(8, 3, 16, 16)]
    )
    added = narrow.get_parameter("c2.bias")
    new = job.new_optimizer(old, narrow)
    assert any(added is p for p in new.param_groups[-1]["params"])
    value = added.detach().clone()
    step(narrow, new)
    assert not torch.equal(added, value)


def test_frozen_layers_and_layers_that_are_not_optimised_stay_out() -> None:
    torch.manual_seed(0)
    network = randomise(BareStream())
    network.get_submodule("c2").requires_grad_(False)
    old = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1, momentum=0.9)
    step(network, old)
    narrow, _ = job.slim(
        network, EXAMPLE, compensate="mean", calibration=[torch.rand(8, 3, 16, 16)]
    )
    new = job.new_optimizer(old, narrow)
    kept = {id(p) for p in new.param_groups[0]["params"]}
    assert not kept & {id(p) for p in narrow.get_submodule("c2").parameters()}
    assert id(narrow.get_parameter("c3.bias")) in kept


def test_a_removed_branch_leaves_and_its_constant_is_optimised() -> None:
    network, old = trained(Branch, OPTIMIZERS["SGD"])
    _, plan = remove(network, EXAMPLE, ["one.0"])
    narrow = job.apply(network, plan)
    assert isinstance(narrow.get_submodule("two"), ConstantOutput)
    new = job.new_optimizer(old, narrow)
    kept = {id(p) for p in new.param_groups[0]["params"]}
    assert kept == {id(p) for p in narrow.parameters()}
    assert narrow.get_parameter("two.bias") not in new.state
    step(narrow, new)
    twice = job.apply(narrow, job.Plan("", 1.0, {}), EXAMPLE)  # its constant is a layer as others
    again = job.new_optimizer(new, twice).state[twice.get_parameter("two.bias")]
    before = new.state[narrow.get_parameter("two.bias")]
    assert torch.equal(again["momentum_buffer"], before["momentum_buffer"])


class Branch(Net):
    def build(self) -> None:
        self.one, self.two = block(12, 8), nn.Conv2d(8, 12, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(self.one(x))


def test_several_cuts_in_one_loop_where_the_wide_network_is_dropped() -> None:
    network, optimizer = trained(PreActivation, OPTIMIZERS["AdamW"])
    sizes = [sum(p.numel() for p in network.parameters())]
    for _ in range(2):
        network, _ = job.slim(network, EXAMPLE, target="params=0.8")
        optimizer = job.new_optimizer(optimizer, network)
        step(network, optimizer)
        sizes.append(sum(s["exp_avg"].numel() for s in optimizer.state.values()))
        assert {id(p) for p in optimizer.state} == {id(p) for p in network.parameters()}
    assert all(more > less for more, less in pairwise(sizes))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 2)], [3]
        ),
    ],
)
def test_schedulers_continue_as_documented(make: Any) -> None:
    rates = []
    for cut in (False, True):
        network, optimizer = trained(Residual, OPTIMIZERS["SGD"], steps=1)
        scheduler, seen = make(optimizer), []
        for epoch in range(7):
            if cut and epoch == 2:
                network, _ = job.slim(network, EXAMPLE)
                optimizer = job.new_optimizer(optimizer, network)
                for each in (scheduler, *getattr(scheduler, "_schedulers", ())):
                    each.optimizer = optimizer
            step(network, optimizer)
            scheduler.step()
            seen.append(optimizer.param_groups[0]["lr"])
        rates.append(seen)
    assert rates[0] == rates[1]


class Wrapped(torch.optim.Optimizer):
    """As Accelerate wraps an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


def test_what_cannot_be_continued_is_refused_with_what_to_write() -> None:
    network, old = trained(Residual, OPTIMIZERS["SGD"])
    narrow, _ = job.slim(network, EXAMPLE)
    again, _ = job.slim(narrow, EXAMPLE, target="params=0.8")
    factored = torch.optim.Adafactor(network.parameters())
    step(network, factored)
    flat = torch.optim.LBFGS(network.parameters())
    for wrong, network_given, message in (
        (network, narrow, "old must be a torch.optim.Optimizer; got"),
        (Wrapped(old), narrow, "pass old.optimizer"),
        (old, copy.deepcopy(narrow), "itself and not a copy"),
        (old, network, "that slim or apply returned"),
        (old, again, "after several cuts, call new_optimizer after each"),
        (factored, narrow, r"write Adafactor\(narrow.parameters\(\), …\)"),
        (flat, narrow, r"write LBFGS\(narrow.parameters\(\), …\)"),
    ):
        with pytest.raises(UsageError, match=message):
            job.new_optimizer(wrong, network_given)
    narrow.get_submodule("head").weight = nn.Parameter(torch.rand(2, 3))
    with pytest.raises(UsageError, match="changed since the cut: head"):
        job.new_optimizer(old, narrow)


def test_the_example_in_its_docstring_runs() -> None:
    failed, tried = doctest.testmod(job.slimming.loop_optimizer)
    assert (failed, tried) == (0, 7)
