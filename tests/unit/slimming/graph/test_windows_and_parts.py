"""Windows, assigned parts and weights of positions: each kind is cut, and equals the masked one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

import job
from support.cuts import randomise
from support.masked import assert_compensated, halve, masked_network
from support.networks import Net, block

IMAGE = torch.rand(1, 3, 20, 28)


class Windows(Net):
    """A convolution written with the windows of its input, whose places are the last channels."""

    def build(self) -> None:
        self.mix, self.norm = nn.Conv2d(12 * 9, 12, 1), nn.BatchNorm2d(12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        windows = F.unfold(x, 3, padding=1).view(len(x), -1, *x.shape[2:])
        return F.relu(self.norm(self.mix(windows)))


class Patches(Net):
    """Patches of 2 x 2 pixels as tokens, and back (Yuan et al. 2021)."""

    def build(self) -> None:
        self.mlp, self.after = nn.Linear(12 * 4, 12 * 4), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.mlp(F.unfold(x, 2, stride=2).transpose(1, 2))
        return self.after(F.fold(tokens.transpose(1, 2), x.shape[2:], 2, stride=2))


class Sliding(Net):
    """Windows along an axis of the image."""

    def build(self) -> None:
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x.unfold(3, 3, 1).mean(-1))


class Involution(Net):
    """Weights of the places of a window, the same for all channels (Li et al. 2021)."""

    def build(self) -> None:
        self.reduce, self.span, self.after = block(12, 6), nn.Conv2d(6, 9, 1), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.span(self.reduce(x)).unsqueeze(1)
        windows = F.unfold(x, 3, padding=1).view(len(x), x.shape[1], 9, *x.shape[2:])
        return self.after((weights * windows.flatten(3).view_as(windows)).sum(2))


class Shifted(Net):
    """A quarter of the channels is shifted to the left, another one up (Lin et al. 2019)."""

    def build(self) -> None:
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        part, out = x.shape[1] // 4, torch.zeros_like(x)
        out[:, :part, :, :-1] = x[:, :part, :, 1:]
        out[:, part : 2 * part, :-1] = x[:, part : 2 * part, 1:]
        out[:, 2 * part :] = x[:, 2 * part :]
        return self.after(out)


class Partial(Net):
    """A convolution of some channels, written over them (Chen et al. 2023)."""

    def build(self) -> None:
        self.part, self.few, self.after = 4, nn.Conv2d(4, 4, 3, padding=1), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, : self.part] = self.few(x[:, : self.part].clone())
        return self.after(x)


class Silenced(Net):
    """Some pixels of all channels are set to a number."""

    def build(self) -> None:
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, :, :2] = 0.5
        return self.after(x)


class Blurred(Net):
    """Each channel blurred by a filter that is no layer, whose number is kept (Zhang 2019)."""

    def build(self) -> None:
        self.channels, self.filter = 12, nn.Buffer(torch.rand(1, 1, 3, 3).repeat(12, 1, 1, 1))
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return self.after(F.conv2d(x, self.filter, stride=2, groups=self.channels))


class Smoothed(Blurred):
    """One filter for all channels, expanded to as many as there are."""

    def build(self) -> None:
        self.filter, self.after = nn.Buffer(torch.rand(1, 1, 3, 3)), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.filter.expand(x.shape[1], 1, 3, 3)
        return self.after(F.conv2d(x, weight, padding=1, groups=x.shape[1]))


class PixelsByHand(Net):
    """A pixel shuffle of four quarters of the channels, before convolutions of both kinds."""

    def build(self) -> None:
        self.wide = block(12, 48)
        self.each, self.after = nn.Conv2d(12, 12, 3, groups=12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        count, channels, height, width = self.wide(x).shape
        parts = self.wide(x).view(count, 2, 2, channels // 4, height, width)
        x = parts.permute(0, 3, 4, 1, 5, 2).reshape(count, -1, 2 * height, 2 * width)
        return self.after(self.each(x))


class Warped(Net):
    """Sampled at places that a convolution computes (Jaderberg et al. 2015)."""

    def build(self) -> None:
        self.places, self.after = nn.Conv2d(12, 2, 1), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.places(x).permute(0, 2, 3, 1).tanh()
        return self.after(F.grid_sample(x, grid, align_corners=False))


class Deformed(Net):
    """Kernels at places, and with weights of these, that a convolution computes (DCN v1, v2)."""

    groups, mask = 1, False

    def build(self) -> None:
        self.places = nn.Conv2d(12, 9 * (3 if self.mask else 2) * self.groups, 3, padding=1)
        self.kernel, self.norm = DeformConv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        places = self.places(x)
        weights = places[:, 18 * self.groups :].sigmoid() if self.mask else None
        x = self.kernel(x, places[:, : 18 * self.groups], weights)
        return self.after(F.relu(self.norm(x)))


class Modulated(Deformed):
    groups, mask = 2, True


class Context(Net):
    """Global context of the image, weighted by one channel (Cao et al. 2019)."""

    def build(self) -> None:
        self.score, self.after = nn.Conv2d(12, 1, 1), block(12, 12)
        self.change = nn.Sequential(
            nn.Conv2d(12, 8, 1), nn.LayerNorm([8, 1, 1]), nn.ReLU(), nn.Conv2d(8, 12, 1)
        )

    def body(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.score(x).flatten(2).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.flatten(2).unsqueeze(1), weights)
        return self.after(x + self.change(context.reshape(len(x), -1, 1, 1)))


class Clusters(Net):
    """Sums of features by cluster, as an equation whose other operand has no channels to cut."""

    out = 36

    def build(self) -> None:
        self.after, self.assign = block(12, 12), nn.Conv2d(12, 3, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.after(x)
        weights = self.assign(x).flatten(2).softmax(1)
        return torch.einsum("bkn,bcn->bkc", weights, x.flatten(2)).flatten(1)[:, :, None, None]


FIXED = {
    Deformed: {"places"},
    Modulated: {"places"},
    Involution: {"span"},
    Warped: {"places"},
    Context: {"score"},
    Clusters: {"assign"},
}
KINDS = [
    Windows, Patches, Sliding, Shifted, Partial, Silenced, Blurred, Smoothed, PixelsByHand, *FIXED
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_windows_parts_and_weights_of_positions_are_cut(kind: type[Net]) -> None:
    torch.manual_seed(0)
    network = randomise(kind())
    narrow, plan = halve(network, IMAGE)
    assert {blocked.layer for blocked in plan.blocked} == {"head"} | FIXED.get(kind, set())
    assert narrow.stem[0].out_channels == (4 if kind is Shifted else 6)  # 1 of 3 in each quarter
    assert narrow.after[0].out_channels == 6 if hasattr(narrow, "after") else narrow.mix


@pytest.mark.parametrize("kind", [Windows, Involution, Shifted, Context, Modulated])
def test_they_are_measured_and_compensated(kind: type[Net]) -> None:
    torch.manual_seed(0)
    network, images = randomise(kind()), torch.rand(48, 3, 20, 28)
    assert_compensated(network, IMAGE, images)


def test_weights_of_positions_that_differ_between_channels_block_them() -> None:
    class Differing(Net):
        def build(self) -> None:
            self.weights, self.after = nn.Conv2d(12, 28, 1), block(12, 12)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            columns = self.weights(x).mean(2).transpose(1, 2)[:, :12, None]  # (N, 12, 1, 28)
            return self.after(x * columns.sigmoid())

    torch.manual_seed(0)
    narrow, plan = halve(randomise(Differing()), IMAGE)
    assert narrow.stem[0].out_channels == 12
    assert {"weights", "stem.0"} <= {blocked.layer for blocked in plan.blocked}


@pytest.mark.parametrize("value", ["constant", "table"])
def test_parts_that_only_the_current_number_of_channels_has_stay(value: str) -> None:
    class Assigned(Net):
        def build(self) -> None:
            self.table, self.after = nn.Buffer(torch.rand(3, 1, 1)), block(12, 12)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, 2:5] = 0.5 if value == "constant" else self.table
            return self.after(x)

    torch.manual_seed(0)
    narrow, plan = job.slim(randomise(Assigned()), IMAGE, policy="uniform", target="width=0.5")
    assert narrow.stem[0].out_channels == 12
    assert narrow.after[0].out_channels == 6
    assert {blocked.layer for blocked in plan.blocked} == {"head", "stem.0"}


def test_a_filter_that_differs_between_channels_blocks_them() -> None:
    class Ramp(Net):
        def build(self) -> None:
            self.after = block(12, 12)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            weight = torch.arange(12.0).to(x).view(-1, 1, 1, 1)
            return self.after(F.conv2d(x, weight, groups=x.shape[1]))

    narrow, plan = halve(randomise(Ramp()), IMAGE)
    assert {blocked.layer for blocked in plan.blocked} == {"head", "stem.0"}
    assert narrow.after[0].out_channels == 6


class Columns(nn.Module):
    """A stack of activations, each weighted by a number, as in FractalNet (Larsson et al. 2017)."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.register_buffer("weights", torch.rand(2, 1, 1, 1, 1) + 0.5)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stack = torch.stack([self.one(x).relu(), self.two(x).relu()], self.axis)
        return self.last((stack * self.weights.movedim(0, self.axis)).sum(self.axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_numbers_that_weight_a_stack_leave_its_channels_free(axis: int) -> None:
    torch.manual_seed(0)
    wide, image = Columns(axis).double().eval(), torch.rand(1, 3, 8, 8)
    narrow, plan = job.slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    assert narrow.one.out_channels == narrow.two.out_channels == 8
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))


class FocalModulation(nn.Module):
    """Two parts and gates of one channel each, of sizes in an attribute (Yang et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.levels = [12, 12, 3], 2
        self.scales = [torch.ones(2) for _ in self.sizes]  # as many as there are parts
        self.stem, self.mixed = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 27, 1)
        self.focal = nn.ModuleList(
            nn.Conv2d(12, 12, 3, padding=1, groups=12) for _ in range(self.levels)
        )
        self.context, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, context, gates = torch.split(self.mixed(self.stem(x)), self.sizes, 1)
        queries = queries * self.scales[0].sum()
        total = torch.zeros_like(queries)
        for level, focal in enumerate(self.focal):
            context = focal(context)
            total = total + context * gates[:, level : level + 1]
        total = total + context.mean((2, 3), keepdim=True) * gates[:, self.levels :]
        return self.last(queries * self.context(total))


def test_parts_beside_one_that_is_never_cut_are_cut() -> None:
    torch.manual_seed(0)
    wide, image = FocalModulation().double().eval(), torch.rand(2, 3, 9, 9, dtype=torch.float64)
    narrow, plan = job.slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    assert narrow.sizes == [6, 6, 3]
    assert (narrow.stem.out_channels, narrow.context.in_channels) == (6, 6)
    assert wide.sizes == [12, 12, 3]
    torch.testing.assert_close(narrow(image), masked_network(wide, plan.layers)(image))


class PartialShortcut(nn.Module):
    """A shortcut to the first channels of a wider output, as in ReXNet (Han et al. 2021)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.conv = inputs, nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.conv(x)
        return torch.cat([wide[:, : self.inputs] + x, wide[:, self.inputs :]], 1)


def test_a_shortcut_to_the_first_channels_is_cut() -> None:
    torch.manual_seed(0)
    widths = (8, 12, 17, 24)  # with a common divisor, and without
    blocks = [PartialShortcut(*pair) for pair in itertools.pairwise(widths)]
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.Conv2d(24, 5, 1)).double().eval()
    image = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    narrow, plan = job.slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    assert {b.layer for b in plan.blocked} == {"4"}
    assert [block.inputs for block in narrow[1:4]] == [b.conv.in_channels for b in narrow[1:4]]
    assert narrow[4].in_channels == 12
    torch.testing.assert_close(narrow(image), masked_network(wide, plan.layers)(image))
