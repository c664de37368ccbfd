"""Whole branches are removed: found by rule, proven, priced, trained, saved, exported, cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import job
from job.errors import GammaslimError
from job.slimming.analysis import analyse
from job.slimming.graph.data_flow import DataFlow
from job.slimming.graph.removed_layers import ConstantOutput, NoOutput
from job.slimming.graph.trace import trace_network
from job.slimming.planning.cost import Cost
from job.slimming.planning.layer_channels import LayerChannels
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify
from support.cuts import randomise
from support.networks import Dense, Gate, Net, PreActivation, Residual, block
from support.removal import removable, remove

EXAMPLE = torch.rand(1, 3, 32, 32)


class Branches(Net):
    """Branches of two layers; the last one has squeeze and excitation within it."""

    def build(self) -> None:
        self.one = nn.Sequential(block(12, 8), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.two = nn.Sequential(block(12, 8, 1), block(8, 9), nn.Conv2d(9, 12, 1, bias=False))
        self.enter, self.leave = block(12, 10), nn.Conv2d(10, 12, 1)
        self.down, self.up = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        out = self.one(x)
        out += x
        x = F.relu(out)
        x = x + self.two(x)
        y = self.enter(x)
        y = y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return x + self.leave(y)


class Parallel(Net):
    """Two paths that are added: one of them must stay."""

    def build(self) -> None:
        self.a, self.b = block(12, 8), block(12, 8)
        self.c, self.d = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x)) + self.d(self.b(x))


class Pooled(Net):
    """A branch with a pooling op that torch does not run on no channels, and one without."""

    def build(self) -> None:
        self.a, self.b = block(12, 8), nn.Conv2d(8, 12, 1)
        self.c, self.d = block(12, 8), nn.Conv2d(8, 12, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.b(F.max_pool2d(self.a(x), 3, 1, 1))
        return x + self.d(self.c(x))


class Strided(Net):
    """A branch with stride, dilation, "same" padding and a 1d-like kernel."""

    def build(self) -> None:
        self.a = block(12, 8)
        self.b = nn.Conv2d(8, 8, (3, 1), padding="same", dilation=(2, 1))
        self.c = nn.Conv2d(8, 12, 3, stride=2, padding=1, padding_mode="reflect")
        self.shortcut = nn.Conv2d(12, 12, 1, stride=2)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.c(F.relu(self.b(self.a(x))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "branches": Branches,
    "residual": Residual,
    "pre-activation": PreActivation,
    "dense": Dense,
    "gate": Gate,
    "strided": Strided,
    "parallel": Parallel,
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=5),
    "resnext": lambda: timm.create_model("resnext26ts", num_classes=5),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
}
MOST = ["branches", "pre-activation", "dense", "strided", "mobilenet_v3_small", "resnet18"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETWORKS[name]())


def measured_channels(network: nn.Module) -> int:
    """The channels of all norms, or in a network without any the outputs of its layers."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        return sum(m.num_features for m in norms)
    kinds = (nn.Conv2d, nn.Linear, ConstantOutput)
    layers = [m for m in network.modules() if isinstance(m, kinds)]
    return sum(len(getattr(m, "weight", m.bias)) for m in layers)


def measured_cost(network: nn.Module) -> Cost:
    """The costs of a network that is there, counted by its tensors and its calls."""
    macs = sum(
        op.result.numel() // 2 * op.argument(1, "weight")[0].numel()
        for op in trace_network(network, EXAMPLE).ops
        if op.name in ("conv2d", "linear")
    )
    state = network.state_dict().values()
    return Cost(
        channels=measured_channels(network),
        params=sum(p.numel() for p in network.parameters()),
        macs=macs,
        bytes=sum(t.numel() * t.element_size() for t in state),
    )


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("residual", "gate")])
@pytest.mark.sampled(2)
def test_each_group_and_all_together_are_removed_proven_and_priced(name: str) -> None:
    network = build(name)
    names = sorted(removable(network, EXAMPLE))
    assert names
    some = names if len(names) < 6 else names[:: len(names) // 4]
    for removed in [*([each] for each in some), names]:
        narrow, plan = remove(network, EXAMPLE, removed, keep=0.7)
        assert plan.proof
        assert plan.proof.error < 1e-9
        assert all(plan.groups[each] == () for each in removed)
        assert plan.after == measured_cost(narrow)
        if len(plan.sizes) <= 24:  # the table shows the layers of small networks
            assert "-> 0" in str(plan)


def test_what_is_removable() -> None:
    assert removable(build("branches"), EXAMPLE) == {
        "one.0.0", "two.0.0", "two.1.0", "enter.0", "down",
    }  # fmt: skip
    assert removable(build("parallel"), EXAMPLE) == {"a.0"}  # the other path must stay
    assert removable(randomise(Pooled()), EXAMPLE) == {"c.0"}  # the op does not run
    assert removable(build("gate"), EXAMPLE) == {"down", "fc1"}  # the gate is constant then
    assert not removable(randomise(torchvision.models.vgg11_bn(num_classes=5)), EXAMPLE)
    assert removable(build("resnet18"), EXAMPLE) == {
        f"layer{n}.{m}.conv1" for n in range(1, 5) for m in range(2)
    }


def test_what_goes_with_a_group() -> None:
    network = build("branches")
    flow = DataFlow(analyse(network, EXAMPLE))
    assert flow.closure([]) == frozenset()
    # nothing needs the layers before, and the layers after are constant
    assert flow.closure(["two.1.0"]) == flow.closure(["two.0.0"]) == {"two.0.0", "two.1.0"}
    assert flow.closure(["enter.0"]) == {"enter.0", "down"}  # the gate on the branch goes too
    assert flow.closure(["down"]) == {"down"}
    assert flow.closure(["one.0.0", "down"]) == {"one.0.0", "down"}


def test_the_branch_is_gone_and_its_constant_stays() -> None:
    network = build("branches")
    narrow, _ = remove(network, EXAMPLE, ["one.0.0"])
    assert set(network.state_dict()) - set(narrow.state_dict()) == {
        *(f"one.0.0.{t}" for t in ("weight",)),
        *(f"one.0.1.{t}" for t in ("weight", "bias", "running_mean", "running_var")),
        "one.0.1.num_batches_tracked", "one.1.weight",
        *(f"one.2.{t}" for t in ("weight", "bias", "running_mean", "running_var")),
        "one.2.num_batches_tracked",
    }  # fmt: skip
    assert isinstance(narrow.get_submodule("one.0.0"), NoOutput)
    constant = narrow.get_submodule("one.1")
    assert isinstance(constant, ConstantOutput)
    conv, norm = network.get_submodule("one.1"), network.get_submodule("one.2")
    expected = norm(conv.bias[None, :, None, None])[0, :, 0, 0]
    torch.testing.assert_close(constant.bias, expected)
    narrow.train()  # the same constant in train mode
    assert torch.equal(constant(torch.rand(2, 0, 4, 4))[1, :, 3, 3], constant.bias)


@pytest.mark.parametrize("compensate", ["beta", "mean", "regress"])
@pytest.mark.parametrize("name", MOST)
@pytest.mark.sampled(2)
def test_compensation_makes_up_for_a_branch(name: str, compensate: str) -> None:
    network = build(name)
    images = [torch.rand(8, 3, 32, 32) for _ in range(3)]
    names = removable(network, EXAMPLE)
    plain, _ = remove(network, EXAMPLE, names)
    narrow, plan = remove(network, EXAMPLE, names, compensate=compensate, batches=images)
    assert plan.after == measured_cost(narrow)
    with torch.no_grad():
        wide = network(images[0])
        before, after = (float((n(images[0]) - wide).norm()) for n in (plain, narrow))
    if compensate == "regress":  # the others know nothing of padded borders or of each other
        assert after < before


def test_the_constant_is_the_mean_of_what_the_wide_layer_put_out() -> None:
    network = build("branches")
    images = [torch.rand(8, 3, 32, 32) for _ in range(3)]
    narrow, _ = remove(network, EXAMPLE, ["enter.0"], compensate="regress", batches=images)
    outputs: list[torch.Tensor] = []
    network.get_submodule("leave").register_forward_hook(lambda *given: outputs.append(given[2]))
    with torch.no_grad():
        for batch in images:
            network(batch)
    mean = torch.cat(outputs).mean((0, 2, 3))
    torch.testing.assert_close(narrow.get_parameter("leave.bias"), mean)


@pytest.mark.parametrize("name", MOST)
def test_it_trains_and_is_cut_and_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    network = build(name)
    names = removable(network, EXAMPLE)
    first, plan = remove(network, EXAMPLE, sorted(names)[: (len(names) + 1) // 2], keep=0.8)
    first.train()
    optimizer = torch.optim.AdamW(first.parameters(), 1e-3)
    first(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in first.parameters())
    optimizer.step()
    second, then = remove(first.eval(), EXAMPLE, removable(first, EXAMPLE), keep=0.8)
    assert then.after == measured_cost(second)
    assert then.after.macs < plan.after.macs
    job.save(second, tmp_path / "slim", plan=[plan, then], model_args=None)
    loaded = job.load(tmp_path / "slim", network=build(name))
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded(images), second(images))


@pytest.mark.parametrize("name", ["branches", "mobilenet_v3_small"])
def test_it_runs_wherever_torch_runs(name: str) -> None:
    network = build(name)
    narrow, _ = remove(network, EXAMPLE, removable(network, EXAMPLE))
    images = torch.rand(2, 3, 32, 32)
    expected = narrow(images)
    last = narrow.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images.contiguous(memory_format=torch.channels_last)), expected)
    assert narrow.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    narrow.float()
    with torch.autocast("cpu", torch.bfloat16):
        narrow(images)
    narrow.double()(images.double())
    narrow.float()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(narrow, (images,), dynamic_shapes=(batch,))
    more = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(more), narrow(more))
    compiled = torch.compile(narrow, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), narrow(images))


def test_a_record_without_empty_sides_is_as_it_was() -> None:
    kept = LayerChannels((0, 2), (1,), bias=True)
    assert kept.to_dict() == {"out": [0, 2], "in": [1], "bias": True}
    empty = LayerChannels((0, 2), (), norm="bn")
    assert empty.to_dict() == {"out": [0, 2], "empty": ["in"], "norm": "bn"}
    for each in (kept, empty):
        assert LayerChannels.from_dict(each.to_dict()) == each
    for wrong in ({"empty": ["x"]}, {"empty": 1}, {"in": [1], "empty": ["in"]}, {"norm": 3},
                  {"empty": [[]]}):  # fmt: skip
        with pytest.raises(GammaslimError):
            LayerChannels.from_dict(wrong)


def test_a_wrong_constant_is_found() -> None:
    network = build("branches")
    narrow, plan = remove(network, EXAMPLE, ["one.0.0"])
    with torch.no_grad():
        narrow.get_parameter("one.1.bias")[3] += 1e-3
    with pytest.raises(GammaslimError, match="constant"):
        verify(network, narrow, plan.layers, EXAMPLE)
    # a removed branch of another network
    with pytest.raises(GammaslimError):
        apply_plan(network, {"stem.0": LayerChannels(in_=(), norm="head")})
