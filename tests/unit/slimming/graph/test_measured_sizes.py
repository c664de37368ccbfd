"""Code that passes on, compares, or splits by the sizes that it reads from a tensor."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.slimming.surgery.trial_cuts import _Trials
from support.masked import halve, masked_network
from support.transformer import zeroed_outputs

IMAGE = torch.rand(1, 3, 16, 16)


def attend(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> torch.Tensor:
    """A function that all kinds of attention share, as in transformers."""
    assert isinstance(module, nn.Module)
    return F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)


class PassedOn(nn.Module):
    """Attention whose scale is an attribute, passed to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.scaling = self.head_dim**-0.5
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        heads = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(attend(self, *heads, scaling=self.scaling).reshape(*x.shape[:-1], -1))


class Compared(nn.Module):
    """A width that is compared with an attribute, which no op takes."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 24
        self.layer = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.width:
            raise ValueError("another width")
        return self.layer(x).relu()


class SplitBySizes(nn.Module):
    """Query, context and gates, by the width of the stream as in FocalNet (Yang et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.level = 2
        self.first, self.last = nn.Linear(24, 2 * 24 + self.level), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        query, context, gates = self.first(x).split((width, width, self.level), -1)
        return self.last(query * context * gates[..., :1] * gates[..., 1:]) + x


class Patches(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Conv2d(3, 24, 4, 4), block(), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize("block", [PassedOn, Compared, SplitBySizes])
def test_half_of_the_channels_are_cut(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    wide = Patches(block).double().eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert {b.layer for b in plan.blocked} <= {"head", "block.first"}  # its gates stay
    assert narrow.embed.out_channels == 12
    inner = {"head_dim": 4, "width": 12}
    for name, value in inner.items():
        assert getattr(narrow.block, name, value) == value
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    without = masked_network(zeroed_outputs(wide, plan), plan.layers)
    torch.testing.assert_close(narrow(images), without(images))


class LayoutByCount(nn.Module):
    """Features whose layout is told by their numbers of channels, as in torchseg's encoders.

    They are 64 pixels wide, as many as the first of them have channels.
    """

    listed = True

    def __init__(self) -> None:
        super().__init__()
        self.widths = [3, 64, 24]
        self.layers = nn.ModuleList([nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 24, 3, 2, 1)])
        self.heads = nn.ModuleList([nn.Conv2d(64, 4, 1), nn.Conv2d(24, 4, 1)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = [x]
        for layer in self.layers:
            features.append(layer(features[-1]).relu())
        widths = self.widths if self.listed else [3, 64, 24]
        for i in range(len(features)):
            if features[i].shape[1] != widths[i] and features[i].shape[-1] == widths[i]:
                features[i] = features[i].permute(0, 3, 1, 2)
        return [head(each) for head, each in zip(self.heads, features[1:], strict=True)]


@pytest.mark.parametrize("listed", [True, False])
def test_code_that_compares_sizes_with_a_list(*, listed: bool) -> None:
    torch.manual_seed(0)
    wide = LayoutByCount().double().eval()
    wide.listed, image = listed, torch.rand(1, 3, 64, 64)
    narrow, plan = job.slim(wide, image, policy="uniform", target="width=0.5", importance="l2")
    if listed:
        assert narrow.widths == [3, 32, 12]
    else:  # the line fails on images of 64 pixels alone
        assert [layer.out_channels for layer in narrow.layers] == [64, 12]
        (blocked,) = (b for b in plan.blocked if b.layer == "layers.0")
        assert "works only for the current number of channels" in blocked.explanation
    images = torch.rand(3, 3, 64, 64, dtype=torch.float64)
    for ours, theirs in zip(narrow(images), masked_network(wide, plan.layers)(images), strict=True):
        torch.testing.assert_close(ours, theirs)


class Stages(nn.Module):
    """Views by an element of a list, as in the Swin Transformer of MMPretrain."""

    def __init__(self) -> None:
        super().__init__()
        self.widths, self.used = [12, 16, 24], (1, 2)
        pairs = zip([3, *self.widths], self.widths, strict=False)
        self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in pairs)
        self.heads = nn.ModuleList(nn.Conv2d(self.widths[i], 4, 1) for i in self.used)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for i, stage in enumerate(self.stages):
            x = stage(x).relu()
            if i in self.used:
                tokens = x.flatten(2).mT
                maps = tokens.view(-1, *x.shape[2:], self.widths[i]).permute(0, 3, 1, 2)
                found.append(self.heads[len(found)](maps))
        return found


class Wide(nn.Sequential):
    """A block that knows its width, which the method of another module passes to an op."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(nn.Conv2d(inputs, width, 3, 2, 1), nn.ReLU())
        self.width = width


class Near(nn.Module):
    """Views by the attribute of a block, as in the VAN of MMPretrain."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Wide(3, 16), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.block
        x = block(x)
        tokens = x.flatten(2).mT
        return self.last(tokens.reshape(-1, *x.shape[2:], block.width).permute(0, 3, 1, 2))


class Longest(nn.Module):
    """Takes the first tokens, fewer than there are channels, as in the ViTSTR of docTR."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.longest = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4), 7
        self.width = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.first(x).flatten(2).mT
        groups = tokens.view(len(x), -1, 4, self.width).amax(2)
        return self.last((tokens + groups.repeat(1, 1, 4))[:, : self.longest])


class Inner(nn.Module):
    """A function within the method splits by an attribute, as in the Res2Net of MMPretrain."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.first, self.last = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 4, 1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(values: torch.Tensor) -> torch.Tensor:
            parts = torch.split(self.first(values).relu(), self.width, 1)
            found = [parts[0]]
            for part, layer in zip(parts[1:], self.layers, strict=True):
                found.append(layer(found[-1] + part).relu())
            return torch.cat(found, 1)

        return self.last(inner(x))


@pytest.mark.parametrize(
    ("make", "attribute", "value"),
    [
        (Stages, "widths", [12, 8, 12]),
        (Inner, "width", 4),
        (Near, "block.width", 8),
        (Longest, "longest", 7),
    ],
)
def test_attributes_that_code_names_elsewhere(
    make: type[nn.Module], attribute: str, value: object
) -> None:
    torch.manual_seed(0)
    wide = make().double().eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert attrgetter(attribute)(narrow) == value
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    without = masked_network(zeroed_outputs(wide, plan), plan.layers)(images)
    torch.testing.assert_close(narrow(images), without)


class ScaleOf(nn.Module):
    """A scale per channel whose view is by attributes, as in MetaFormer (Yu et al. 2022)."""

    def __init__(self, channels: int, how: str) -> None:
        super().__init__()
        self.how, self.channels = how, channels
        self.shape: tuple[int, ...] | list[int] = (channels, 1, 1)
        if how == "list":
            self.shape = list(self.shape)
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "number":
            return x * self.scale.reshape(1, self.channels, 1, 1)
        return x * self.scale.view(self.shape)


@pytest.mark.parametrize("how", ["tuple", "list", "number"])
def test_attributes_that_a_view_of_a_parameter_takes(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(_Trials, "failure", lambda *_, **__: pytest.fail("a trial cut"))
    stream = [nn.Conv2d(3, 12, 1), ScaleOf(12, how), nn.ReLU(), ScaleOf(12, how)]
    wide = nn.Sequential(*stream, nn.Flatten(), nn.Linear(12 * 64, 4)).double().eval()
    narrow, plan = halve(wide, torch.rand(1, 3, 8, 8, dtype=torch.float64))
    assert [b.layer for b in plan.blocked] == ["5"]
    for scale in (narrow[1], narrow[3]):
        assert scale.scale.shape == (6,)
        assert (tuple(scale.shape), scale.channels) == ((6, 1, 1), 6)
        assert type(scale.shape) is type(wide[1].shape)


class CheckedImages(nn.Module):
    """Patches of images whose size is compared with an attribute, as in DeiT of transformers.

    By chance there are as many channels as pixels of a side.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.patches = (24, 24), nn.Conv2d(3, 24, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, _, height, width = x.shape
        patches = self.patches(x).flatten(2).mT
        count, places, _ = patches.size()
        if (height, width) != (self.image_size[0], self.image_size[1]):
            raise ValueError("images of another size")
        return patches + patches.new_zeros(count, places, 1)


def test_an_attribute_that_equals_a_number_of_channels_by_chance() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(CheckedImages(), PassedOn(), nn.Linear(24, 5)).double().eval()
    narrow, plan = job.slim(
        wide, torch.rand(1, 3, 24, 24), policy="uniform", target="width=0.5", importance="l2"
    )
    assert [blocked.layer for blocked in plan.blocked] == ["2"]
    assert narrow[0].image_size == (24, 24)
    assert (narrow[0].patches.out_channels, narrow[1].head_dim) == (12, 4)
