"""Weights that are standardised in each forward pass are cut with their inputs and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.slimming.analysis import analyse
from support.masked import masked_network
from support.networks import Net

IMAGE = torch.rand(1, 3, 12, 12)


class ByBatchNorm(nn.Conv2d):
    """Rows normalised by a BatchNorm, and scaled by a gain (Brock et al. 2021)."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = 0.7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, gain = (
            self.weight.reshape(1, self.out_channels, -1),
            (self.gain * self.scale).view(-1),
        )
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class ByMeans(nn.Conv2d):
    """Rows less their mean, over their deviation (Qiao et al. 2019)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        mean = weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - mean
        deviation = weight.view(len(weight), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / deviation.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class ByMoments(nn.Conv2d):
    """Rows less their mean, over their deviation, both in one call (Kolesnikov et al. 2020)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class ByKernels(nn.Conv2d):
    """Rows less the mean over their kernels, and then over the inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        of_kernels = self.weight.mean((2, 3), keepdim=True)
        weight = self.weight - 0.5 * of_kernels - 0.5 * of_kernels.mean(1, keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


KINDS = [ByBatchNorm, ByMeans, ByMoments, ByKernels]


def network(kind: type[nn.Conv2d]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = kind(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), kind(16, 12, 3), nn.ReLU()
    depthwise = kind(12, 12, 3, groups=12)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    return nn.Sequential(*layers, depthwise, nn.ReLU(), *head).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_standardised_weight_takes_its_statistics_over_the_kept_inputs(
    kind: type[nn.Conv2d],
) -> None:
    wide = network(kind)
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert plan.proof is not None
    assert plan.proof.error <= 1e-9
    assert [b.layer for b in plan.blocked] == ["9"]
    assert (narrow[3].in_channels, narrow[3].out_channels, narrow[5].groups) == (8, 6, 6)
    kept = plan.layers["3"]
    rows, columns = torch.tensor(kept.out), torch.tensor(kept.in_)
    assert torch.equal(narrow[3].weight, wide[3].weight[rows][:, columns])
    if kind is ByBatchNorm:
        assert torch.equal(narrow[3].gain, wide[3].gain[rows])
    narrow.train()(torch.rand(2, 3, 12, 12)).sum().backward()
    assert narrow[3].weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_a_standardised_weight_lose_the_same_inputs(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    grouped = kind(16, 24, 3, padding=1, groups=4)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)
    wide = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), grouped, nn.ReLU(), *head).eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert [b.layer for b in plan.blocked] == ["6"]
    assert (narrow[2].in_channels, narrow[2].out_channels, narrow[2].groups) == (8, 12, 4)
    kept = torch.tensor(plan.layers["2"].in_).reshape(4, 2)
    assert torch.equal(kept, kept[:1] + torch.arange(0, 16, 4)[:, None])
    rows = torch.tensor(plan.layers["2"].out)
    of_kept = kind(8, 12, 3, padding=1, groups=4)  # its code takes their statistics
    of_kept.weight.data = wide[2].weight[rows][:, kept[0]]
    of_kept.bias.data = wide[2].bias[rows]
    if kind is ByBatchNorm:
        of_kept.gain.data = wide[2].gain[rows]
    with torch.no_grad():
        values = wide[:2](IMAGE)
        torch.testing.assert_close(narrow[:3](IMAGE), of_kept(values[:, kept.flatten()]))


@pytest.mark.parametrize("compensate", ["mean", "regress"])
def test_weights_that_are_computed_are_not_fitted(compensate: str) -> None:
    wide, images = network(ByMeans), [torch.rand(16, 3, 12, 12)]
    narrow, plan = job.slim(
        wide, IMAGE, target="channels=0.7", importance="l2", compensate=compensate,
        allocate="local", calibration=images,
    )  # fmt: skip
    kept = plan.layers["3"]
    cut = wide[3].weight if kept.out is None else wide[3].weight[torch.tensor(kept.out)]
    cut = cut if kept.in_ is None else cut[:, torch.tensor(kept.in_)]
    assert torch.equal(narrow[3].weight, cut)


class Branch(nn.Module):
    """A convolution that may be normalised, and added to its input."""

    def __init__(self, *, normed: bool, added: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 24, 1)
        self.conv = ByMeans(24, 16, 3, padding=1, bias=not normed)
        self.norm = nn.BatchNorm2d(16) if normed else nn.Identity()
        self.last, self.added = nn.Linear(16, 5), added
        if normed:
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.norm(self.conv(self.inner(x).relu()))
        return x + y if self.added else y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.sums(x).relu().mean((2, 3)))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_the_constant_of_a_layer_that_computes_its_weight_is_fitted(
    normed: bool, added: bool
) -> None:
    torch.manual_seed(0)
    wide, images = Branch(normed=normed, added=added).eval(), torch.rand(8, 3, 12, 12)
    narrow, plan = job.slim(
        wide, IMAGE, policy="uniform", target="width=0.5", importance="l2",
        compensate="regress", calibration=[images], ignore=["first", "last"],
    )  # fmt: skip
    assert plan.layers["conv"].in_ is not None
    with torch.no_grad():
        means = [each.sums(images).mean((0, 2, 3)) for each in (narrow, wide)]
    torch.testing.assert_close(*means, rtol=1e-3, atol=1e-4)


class Transposed(nn.Conv2d):
    """A weight whose rows are computed from its columns, which no rule covers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.transpose(0, 1) - self.weight.mean(0, keepdim=True))


class Flipped(nn.Conv2d):
    """A weight whose rows are computed from two rows each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, (self.weight.flip(0) + self.weight).view_as(self.weight))


class OfGains(ByBatchNorm):
    """Rows scaled by gains over their mean, which depends on all rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight * (self.gain / self.gain.mean(0, keepdim=True)))


class Read(Net):
    """Statistics of a weight that the output of the layer is scaled by."""

    out = 8

    def build(self) -> None:
        self.one = nn.Conv2d(12, 8, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) * self.one.weight.mean((1, 2, 3))[:, None, None]


@pytest.mark.parametrize("kind", [Transposed, Flipped, OfGains])
def test_other_computed_weights_are_left_alone(kind: type[nn.Conv2d]) -> None:
    layers = nn.Conv2d(3, 8, 1), kind(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(8, 5)).eval()
    blocked = {b.layer: b for b in analyse(model, IMAGE).blocked}
    assert "0" in blocked
    assert "store it as the weight" in blocked["0"].remedy


def test_statistics_of_a_weight_that_scale_an_output_block_its_layer() -> None:
    model = Read()
    assert {b.layer for b in analyse(model.eval(), IMAGE).blocked} >= {"one"}


def test_large_standardised_weights_are_cut() -> None:
    torch.manual_seed(0)
    layers = ByBatchNorm(3, 64, 1), nn.ReLU(), ByBatchNorm(64, 256, 1), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 5))
    assert [b.layer for b in analyse(model.eval(), IMAGE).blocked] == ["6"]


class Cosines(nn.Module):
    """Cosines of features and classes (Wang et al. 2018), from a bare weight or that of a layer."""

    def __init__(self, *, bare: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.weight = nn.Parameter(torch.randn(5, 16)) if bare else None
        self.classes = None if bare else nn.Linear(16, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.conv(x).relu().mean((2, 3))
        weight = self.classes.weight if self.weight is None else self.weight
        return 8 * F.linear(F.normalize(features), F.normalize(weight, dim=-1))


@pytest.mark.parametrize("bare", [True, False])
def test_the_features_of_cosines_are_cut(bare: bool) -> None:
    torch.manual_seed(0)
    wide = Cosines(bare=bare).eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert plan.proof is not None
    assert plan.proof.error <= 1e-9
    name = "weight" if bare else "classes"
    assert [blocked.layer for blocked in plan.blocked] == [name]
    kept = torch.tensor(plan.layers[name].in_)
    assert len(kept) == 8
    weight = wide.weight if bare else wide.classes.weight
    images = torch.rand(4, 3, 12, 12)
    features = wide.conv(images).relu().mean((2, 3))[:, kept]
    cosines = F.cosine_similarity(features[:, None], weight[:, kept], dim=2)
    torch.testing.assert_close(narrow(images), 8 * cosines)
    fitted, _ = job.slim(wide, IMAGE, target="macs=0.7", calibration=[torch.rand(32, 3, 12, 12)])
    assert {*fitted.state_dict()} == {*wide.state_dict()}
    fitted.train()(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in fitted.parameters())


class ByMask(nn.Conv2d):
    """Only some values of the weight, as in X-DenseNet (Prabhu et al. 2018)."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight * self.mask
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_the_mask_of_a_weight_is_cut_with_it(groups: int) -> None:
    torch.manual_seed(0)
    middle = ByMask(16, 16, 3, groups=groups)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(16, 5, 1)
    wide = nn.Sequential(*layers).double().eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert narrow[2].mask.shape == narrow[2].weight.shape
    assert narrow[2].out_channels == 8
    images = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))


class Mixture(nn.Module):
    """A convolution by a mixture of kernels for each sample (Yang et al. 2019, CondConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 1)
        self.routing, self.kernels = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 16 * 8 * 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        count, channels, height, width = x.shape
        mixed = torch.sigmoid(self.routing(x.mean((2, 3)))) @ self.kernels
        weight = mixed.view(count * 16, channels, 3, 3)
        y = F.conv2d(x.view(1, count * channels, height, width), weight, groups=count)
        return self.last(y.view(count, 16, height - 2, width - 2).relu())


def test_a_mixture_of_kernels_keeps_its_channels_and_loses_experts() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1), Mixture())
    wide.double().eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    shapes = {key: tuple(value.shape) for key, value in narrow.state_dict().items()}
    assert (shapes["0.weight"][0], shapes["3.kernels"]) == (3, (2, 16 * 8 * 9))
    assert {"3.first", "3.kernels"} <= {blocked.layer for blocked in plan.blocked}
    images = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))


class Masked(nn.Conv2d):
    """A convolution that sees earlier places alone, by one mask for all kernels (PixelCNN)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        mask = torch.ones(1, 1, 3, 3)
        mask[..., 2, :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def test_a_mask_of_all_kernels_stays_as_it_is() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(Masked(3, 8), nn.ReLU(), Masked(8, 6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    wide.double().eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert narrow[0].mask.shape == (1, 1, 3, 3)
    assert (narrow[0].out_channels, narrow[2].out_channels) == (4, 3)
    assert plan.proof.error <= 1e-12


def test_a_computed_bias_of_one_output() -> None:
    class Equalised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight * 0.5, self.bias * 2.0)

    wide = nn.Sequential(Equalised(6, 16), nn.ReLU(), Equalised(16, 1)).eval()
    narrow, plan = job.slim(wide, torch.rand(2, 6), target="channels=0.6", importance="l2")
    assert narrow[0].out_features < 16
    assert not any("an error of Gammaslim" in blocked.reason for blocked in plan.blocked)
