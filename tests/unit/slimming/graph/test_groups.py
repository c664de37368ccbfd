"""Channel groups of many networks: every cut equals the wide network without those channels."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from job import UsageError, slim
from job.models.factory import build_network
from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import CalibrationData
from job.slimming.importance.criteria import gamma_importance, score_channels
from job.slimming.inputs import tensors_in
from job.slimming.planning.allocation import Allocation, make_plan
from job.slimming.planning.cost import Cost
from job.slimming.planning.cost_model import CostModel
from job.slimming.planning.plan import keep_all
from job.slimming.planning.target import Budget
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify
from support.cuts import randomise
from support.networks import CUTTABLE, LEFT_ALONE, Halves, Quarters, SelectiveKernels, SpatialGate

TORCHVISION = {
    "vgg11_bn": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "densenet121": 64,
    "googlenet": 96, "inception_v3": 299, "mobilenet_v2": 64, "mobilenet_v3_large": 64,
    "mobilenet_v3_small": 64, "mnasnet0_5": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "regnet_x_400mf": 64, "regnet_y_400mf": 64, "shufflenet_v2_x1_0": 64,
}  # fmt: skip


def torchvision_network(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return randomise(torchvision.models.get_model(name, weights=None, num_classes=7, **options))


def counted(network: nn.Module, image: torch.Tensor) -> Cost:
    """What the network costs, by torch's own counters."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        copy.deepcopy(network).eval()(image)
    found = counter.get_flop_counts()["Global"]  # what multiplies activations is left out
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if norms and not any(isinstance(m, nn.GroupNorm) for m in network.modules()):
        channels = sum(m.num_features for m in norms)
    else:
        channels = sum(len(m.weight) for m in layers)
    return Cost(
        channels,
        sum(p.numel() for p in network.parameters()),
        sum(flops for op, flops in found.items() if "bmm" not in str(op)) // 2,
        sum(t.numel() * t.element_size() for t in network.state_dict().values()),
    )


def check_cut(network: nn.Module, image: torch.Tensor, ratio: float, importance: str) -> nn.Module:
    """Cut to about 1 - ``ratio`` of the channels, prove it, count it, train one step."""
    graph = analyse(network, image)
    scores = score_channels(importance, network, graph, CalibrationData())
    allocation = Allocation("uniform", Budget("width", 1 - ratio))
    plan = make_plan(network, graph, scores, allocation)
    narrow = apply_plan(network, plan.layers)
    assert verify(network, narrow, plan.layers, image, graph).error <= 1e-9
    assert counted(narrow, image) == plan.after
    assert plan.after.params < plan.before.params
    train_a_step(narrow, image)
    return narrow


def train_a_step(network: nn.Module, image: torch.Tensor) -> None:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    batch = torch.rand(2, *image.shape[1:])
    sum(out.square().sum() for out in tensors_in(network(batch))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
    optimizer.step()
    network.eval()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.sampled(5)
def test_cuts_of_torchvision_networks_are_proven(name: str, ratio: float) -> None:
    size = TORCHVISION[name]
    network = torchvision_network(name)
    check_cut(network, torch.rand(1, 3, size, size), ratio, "gamma")


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["vgg19-cifar", "resnet164-cifar", "densenet40-cifar"])
@pytest.mark.sampled(3)
def test_cuts_of_the_papers_networks_are_proven(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    network = randomise(build_network(name, 10, {}))
    graph = analyse(network, torch.rand(1, 3, 32, 32))
    selecting = {p.layer for p in graph.slots if p.side == "select"}
    # of the paper: 54 blocks and the last BatchNorm select; 36 layers, 2 transitions and the last
    assert len(selecting) == {"vgg19-cifar": 0, "resnet164-cifar": 55, "densenet40-cifar": 39}[name]
    check_cut(network, torch.rand(1, 3, 32, 32), ratio, "gamma")


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", CUTTABLE)
@pytest.mark.sampled(3)
def test_cuts_of_peculiar_networks_are_proven(kind: type[nn.Module], ratio: float) -> None:
    torch.manual_seed(1)
    network = randomise(kind())
    image = torch.rand(1, 3, 33, 27) if kind.__name__ == "Flattened" else torch.rand(1, 3, 20, 28)
    graph = analyse(network, image)
    groups = {group.name for group in graph.groups}
    assert "stem.0" in groups or kind.__name__ in ("PreActivation", "Flattened", "Grouped"), graph
    if ratio == 0.1:  # too few channels to cut a tenth of: one of each
        ratio = 0.2
    check_cut(network, image, ratio, "gamma")
    check_cut(network, image, ratio, "random")


@pytest.mark.parametrize("kind", [Halves, Quarters])
def test_slices_by_fractions_of_the_channels_are_cut(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    graph = analyse(randomise(kind()), torch.rand(1, 3, 20, 28))
    blocks = {group.name: group.blocks for group in graph.groups}
    assert blocks["conv.0"] is not None  # as many stay in each part


def test_ways_that_are_chosen_between_are_cut_together() -> None:
    graph = analyse(randomise(SelectiveKernels()), torch.rand(1, 3, 20, 28))
    layers = {group.name: group.layers for group in graph.groups}
    assert layers["three.0"] == ("three.0", "five.0", "excite", "after.0")
    assert [b.layer for b in graph.blocked] == ["head"]


def test_one_map_for_all_channels_is_left_alone_and_they_are_not() -> None:
    graph = analyse(randomise(SpatialGate()), torch.rand(1, 3, 20, 28))
    assert [group.layers for group in graph.groups] == [("stem.0", "after.0")]
    assert [b.layer for b in graph.blocked] == ["map", "head"]
    assert not graph.suspects  # all is understood


@pytest.mark.parametrize(("kind", "layer"), LEFT_ALONE.items())
def test_what_is_not_understood_is_left_alone_with_the_reason(
    kind: type[nn.Module], layer: str
) -> None:
    torch.manual_seed(1)
    network = randomise(kind())
    image = torch.rand(1, 3, 20, 28)
    graph = analyse(network, image)
    blocked = {b.layer: b for b in graph.blocked}
    assert blocked[layer].channels == 12
    assert len(blocked[layer].reason) > 10
    assert all(layer not in group.layers for group in graph.groups)
    if graph.groups:
        check_cut(network, image, 0.5, "gamma")


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_0"])
def test_networks_without_batchnorm_have_nothing_to_slim(name: str) -> None:
    network = torchvision_network(name)
    image = torch.rand(1, 3, 64, 64)
    graph = analyse(network, image)
    assert all(group.norms == () for group in graph.groups)
    check_cut(network, image, 0.5, "l2")  # but by another importance


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_without_auxiliary_heads(name: str) -> None:
    network = torchvision_network(name, aux_logits=False)
    assert not analyse(network, torch.rand(1, 3, 96, 96)).auxiliary
    if name == "googlenet":
        check_cut(network, torch.rand(1, 3, 96, 96), 0.5, "gamma")


def test_an_auxiliary_head_that_images_are_too_small_for_is_the_reason_of_a_refusal() -> None:
    network = torchvision_network("inception_v3")
    with pytest.raises(UsageError, match=r"AuxLogits.* in train mode, which fails; to cut them: "):
        slim(network, torch.rand(1, 3, 96, 96), target="width=0.5", policy="uniform")


def test_shufflenet_leaves_long_shuffled_streams_alone_and_says_so() -> None:
    network = torchvision_network("shufflenet_v2_x1_0")
    graph = analyse(network, torch.rand(1, 3, 64, 64))
    reasons = {b.reason for b in graph.blocked if b.layer.startswith("stage")}
    assert reasons == {"parts that must stay equally large overlap"}
    assert not [b for b in graph.blocked if b.layer.startswith("stage4")]  # halves of halves
    inner = {group.name for group in graph.groups}
    assert {"stage2.1.branch2.0", "stage3.0.branch2.0", "conv5.0"} <= inner


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "mobilenet_v3_large"])
def test_costs_of_a_plan_are_those_of_the_built_network(name: str) -> None:
    network, image = torchvision_network(name), torch.rand(1, 3, 64, 64)
    graph = analyse(network, image)
    scores = gamma_importance(network, graph)
    assert CostModel(network, graph).cost(keep_all(graph)) == counted(network, image)
    for target in ("channels=0.4", "params=0.31", "macs=0.2", "bytes=0.6"):
        plan = make_plan(network, graph, scores, Allocation("global", Budget.parse(target)))
        assert counted(apply_plan(network, plan.layers), image) == plan.after, target


class Drawn(nn.Module):
    """Stochastic depth by the ops of torchvision, of timm, or of the first implementations."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        shape = (len(x), 1, 1, 1)
        if self.by == "torchvision":
            return x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(0.9).div_(0.9)
        if self.by == "timm":
            return x * x.new_empty(shape).bernoulli_(0.9).div_(0.9)
        if self.by == "old":
            noise = 0.9 + torch.rand(shape, dtype=x.dtype, device=x.device)
            return x.div(0.9) * noise.floor_()
        return x * torch.rand((1, x.shape[1], 1, 1), dtype=x.dtype, device=x.device)


@pytest.mark.parametrize("by", ["torchvision", "timm", "old", "channels"])
def test_noise_of_drop_path_calls_for_no_trial_cut_as_noise_of_channels_does(by: str) -> None:
    network = randomise(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Drawn(by), nn.ReLU(), nn.Conv2d(8, 5, 3),
    ))  # fmt: skip
    image = torch.rand(1, 3, 8, 8)
    graph = analyse(network, image)
    assert graph.odd == (by == "channels")
    assert bool(graph.suspects) == (by == "channels")
    assert graph.groups
    check_cut(network, image, 0.5, "gamma")
