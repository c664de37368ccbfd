"""Hand-written networks with one peculiarity each, for what follows channels through operations."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def block(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    padding = kernel // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Net(nn.Module):
    """Stem and head around ``body``, which the others give; images of any size."""

    width = 12
    out = 12

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, self.width)
        self.head = nn.Linear(self.out, 5)
        self.build()

    def build(self) -> None: ...

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(F.adaptive_avg_pool2d(self.body(self.stem(images)), 1).flatten(1))


class Residual(Net):
    def build(self) -> None:
        self.one, self.two = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(x)
        more = self.two(x).clone()
        more += x
        return more


class PreActivation(Net):
    def build(self) -> None:
        self.n1, self.c1 = nn.BatchNorm2d(12), nn.Conv2d(12, 10, 3, padding=1)
        self.n2, self.c2 = nn.BatchNorm2d(10), nn.Conv2d(10, 12, 1)
        self.n3, self.c3 = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.c2(F.relu(self.n2(self.c1(F.relu(self.n1(x))))))
        return x + self.c3(F.leaky_relu(self.n3(x)))


class BareStream(PreActivation):
    """Its last convolutions have no bias and no BatchNorm behind them."""

    def build(self) -> None:
        super().build()
        self.c2, self.c3 = nn.Conv2d(10, 12, 1, bias=False), nn.Conv2d(12, 12, 1, bias=False)


class Dense(Net):
    out = 12 + 6 + 6

    def build(self) -> None:
        self.one, self.two = block(12, 6), block(18, 6)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x]
        for layer in (self.one, self.two):
            parts.append(layer(torch.cat(parts, 1)))
        return torch.cat(parts, dim=1)


class Gate(Net):
    """Squeeze and excitation, once by convolutions and once by linear layers and a view."""

    def build(self) -> None:
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.fc1, self.fc2 = nn.Linear(12, 4), nn.Linear(4, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))
        batch, channels, _, _ = x.shape
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid().view(batch, channels, 1, 1)
        return x * gate.expand_as(x)


class Gated(Net):
    """Halves by chunk, multiplied (a gated linear unit)."""

    def build(self) -> None:
        self.conv = block(12, 24)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return value * gate.sigmoid()


class Parts(Net):
    """Halves by chunk that go different ways, and a shuffle of them."""

    out = 16

    def build(self) -> None:
        self.conv, self.left, self.right = block(12, 16), block(8, 8), block(8, 8)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.conv(x).chunk(2, 1)
        x = torch.cat([self.left(left), self.right(right)], 1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(batch, -1, height, width)


class Grouped(Net):
    def build(self) -> None:
        self.inner, self.grouped = block(12, 12, 1), block(12, 24, groups=4)
        self.outer = block(24, 12, 1)
        self.deep = block(12, 24, groups=12)
        self.back = block(24, 12, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.deep(self.outer(self.grouped(self.inner(x)))))


class ShuffledGroups(Net):
    """Grouped 1x1, channel shuffle, depthwise, grouped 1x1 (ShuffleNet v1)."""

    def build(self) -> None:
        self.one, self.two = block(12, 24, 1, groups=3), block(24, 24, groups=24)
        self.three = block(24, 12, 1, groups=3)
        self.shuffle = nn.ChannelShuffle(3)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.shuffle(self.one(x))))


class PaddedShortcut(Net):
    """The parameter-free shortcut of ResNet-20 for CIFAR: strided, channels padded with zeros."""

    out = 16

    def build(self) -> None:
        self.conv = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.after = block(16, 16)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 1, 2, 1))[:, :, 1:-1]  # as TensorFlow pads: not the channels
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.after(F.relu(self.conv(x) + short))


class Scaled(Net):
    """A learnt scale for each channel, GeM pooling, PReLU, a BatchNorm with no convolution."""

    def build(self) -> None:
        self.scale = nn.Parameter(torch.rand(1, 12, 1, 1) + 0.5)
        self.power, self.act = nn.Parameter(torch.tensor(3.0)), nn.PReLU(12)
        self.norm, self.conv = nn.BatchNorm2d(12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(self.norm(x)) * self.scale)
        return F.avg_pool2d(x.clamp(min=1e-6).pow(self.power), 2).pow(1 / self.power)


class Shared(Net):
    """One module used twice."""

    def build(self) -> None:
        self.conv = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.gelu(self.conv(x)))


class Functional(Net):
    """A convolution without a module, its weight a plain parameter."""

    def build(self) -> None:
        self.kernel = nn.Parameter(torch.randn(12, 12, 3, 3) * 0.1)
        self.norm = nn.BatchNorm2d(12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return F.hardswish(self.norm(F.conv2d(x, self.kernel, padding=1)))


class Reparameterised(Net):
    """RepVGG's block: 3x3 + 1x1 + identity, each with its BatchNorm."""

    def build(self) -> None:
        self.a = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.b = nn.Sequential(nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.c = nn.BatchNorm2d(12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.a(x) + self.b(x) + self.c(x))


class Flattened(nn.Module):
    """Odd resolution, flatten, a hidden linear layer with BatchNorm1d; a dict of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(*block(3, 10), nn.MaxPool2d(2), *block(10, 14))
        self.hidden = nn.Sequential(nn.LazyLinear(20), nn.BatchNorm1d(20), nn.ReLU())
        self.head, self.other = nn.Linear(20, 5), nn.Linear(20, 3)
        self(torch.zeros(2, 3, 33, 27))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.conv(images)
        x = self.hidden(features.view(features.size(0), -1))
        return {"logits": self.head(x), "more": self.other(x)}


class FixedView(Net):
    """Numbers of channels written into a view: only the present number works."""

    def build(self) -> None:
        self.conv = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x.view(x.shape[0], 3, 4, *x.shape[2:]).transpose(1, 2).reshape_as(x)


class FixedSplit(Net):
    def build(self) -> None:
        self.conv = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        one, two = torch.split(self.conv(x), [8, 4], 1)
        return torch.cat([two, one], 1)


class EfficientAttention(Net):
    """ECA: a convolution along the channels."""

    def build(self) -> None:
        self.along, self.conv = nn.Conv1d(1, 1, 3, padding=1), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.along(x.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(-1)
        return self.conv(x * gate)


class Written(Net):
    """Some channels are written to in place."""

    def build(self) -> None:
        self.conv, self.after = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).clone()
        x[:, 2:5] = 0.5
        return self.after(x)


class Normalised(Net):
    """GroupNorm between convolutions: no BatchNorm ranks them."""

    def build(self) -> None:
        self.conv, self.norm, self.after = block(12, 12), nn.GroupNorm(3, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.norm(self.conv(x)))


class Measured(Net):
    """Network that reshapes the result of an unsupported op by the sizes of a supported one."""

    def build(self) -> None:
        self.conv, self.inner, self.after = block(12, 12), nn.Conv2d(12, 12, 1), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        places = self.inner(x).flatten(2).transpose(1, 2).cumsum(2)
        return self.after(places.transpose(1, 2).reshape(x.shape))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return torch.from_numpy(x.detach().numpy()[:, ::-1].copy()).square()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient


class Custom(Net):
    """A function of torch.autograd's that turns the channels round, hidden from the recording."""

    def build(self) -> None:
        self.conv, self.after = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(_Reversed.apply(self.conv(x)))


class Places(Net):
    """Operations over or along places, and of several operands, channel by channel."""

    def build(self) -> None:
        self.one, self.other = block(12, 12), block(12, 12)
        self.two, self.three = block(12, 24), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.stack([self.one(x), self.other(x)], 1).amax(1)
        x = self.three(y)
        y = torch.where(x > 0.5, x, self.three(x))
        z = torch.addcmul(y.masked_fill(y.le(0.2), 0.1), x, y, value=0.3)
        spread = z.std((2, 3), keepdim=True) + z.flatten(2).norm(dim=2)[..., None, None]
        weights = z.flatten(2).softmax(-1).view(z.shape).cumsum(3)
        z = F.glu(self.two(torch.lerp(z, weights * spread, 0.3)), dim=1)
        z = F.normalize(z, dim=2) + z.max(3, keepdim=True).values
        return self.three(z) * torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)


class SpatialGate(Net):
    """One map of weights for all channels (Woo et al. 2018)."""

    def build(self) -> None:
        self.map, self.after = nn.Conv2d(12, 1, 1), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.map(x).softmax(3) * x) + x


class SelectiveKernels(Net):
    """Chooses between two ways, channel by channel (Li et al. 2019)."""

    def build(self) -> None:
        self.three, self.five = block(12, 12), block(12, 12, 5)
        self.squeeze, self.excite = block(12, 8, 1), nn.Conv2d(8, 24, 1)
        self.after = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        ways = torch.stack([self.three(x), self.five(x)], 1)
        weights = self.excite(self.squeeze(ways.sum(1).mean((2, 3), keepdim=True)))
        weights = weights.view(len(x), 2, -1).softmax(1).reshape(len(x), -1)
        weights = weights.view(len(x), 2, -1, 1, 1)
        return self.after((ways * weights).sum(dim=1)) * ways.amax((1, 3, 4))[:, :, None, None]


class Counted(Net):
    """Computes with how many channels there are."""

    def build(self) -> None:
        self.conv, self.after = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.after(x / x.size(1) ** 0.5)


class AcrossChannels(Net):
    def build(self) -> None:
        self.conv, self.after = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.conv(x).softmax(1))


class Halves(Net):
    """Slices by a fraction of the channels go different ways."""

    out = 16

    def build(self) -> None:
        self.conv, self.left, self.right = block(12, 20), block(10, 8), block(10, 8)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        half = x.shape[1] // 2
        return torch.cat([self.left(x[:, :half]), self.right(x[:, half:])], 1)


class Quarters(Halves):
    def build(self) -> None:
        self.conv, self.left, self.right = block(12, 20), block(5, 8), block(15, 8)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        rest = 3 * x.shape[1] // 4
        one, other = x.split([x.shape[1] - rest, rest], 1)
        return torch.cat([self.left(one), self.right(other)], 1)


class FixedHalves(Net):
    """Slices by numbers that are those of the present width."""

    def build(self) -> None:
        self.conv, self.left, self.right = block(12, 12), block(6, 6), block(6, 6)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return torch.cat([self.left(x[:, :6]), self.right(x.narrow(1, 6, 6))], 1)


class OddSlices(FixedHalves):
    def build(self) -> None:
        self.conv, self.left, self.right = block(12, 12), block(5, 6), block(7, 6)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        part = (x.shape[1] - 1) // 2
        return torch.cat([self.left(x[:, :part]), self.right(x[:, part:])], 1)


class Plain(Net):
    """BatchNorms without γ, without statistics, without either, with a cumulative average."""

    def build(self) -> None:
        kinds = (
            {"affine": False}, {"track_running_stats": False}, {"momentum": None},
            {"affine": False, "track_running_stats": False},
        )  # fmt: skip
        self.convs = nn.ModuleList(nn.Conv2d(12, 12, 1, bias=False) for _ in kinds)
        self.norms = nn.ModuleList(nn.BatchNorm2d(12, **kind) for kind in kinds)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class Centres(Net):
    """Centres of classes, which only train mode reads."""

    def build(self) -> None:
        self.c, self.centres = block(12, 12), nn.Parameter(torch.randn(5, 12))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.c(self.stem(images)).mean((2, 3))
        logits = self.head(features)
        return (logits, self.extra(features)) if self.training else (logits,)

    def extra(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cdist(features, self.centres)


class Queue(Centres):
    def build(self) -> None:
        self.c = block(12, 12)
        self.register_buffer("queue", torch.randn(12, 7))

    def extra(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.queue


class MovingAverage(Queue):
    def build(self) -> None:
        self.c = block(12, 12)
        self.register_buffer("average", torch.zeros(12))

    def extra(self, features: torch.Tensor) -> torch.Tensor:
        self.average.lerp_(features.detach().mean(0), 0.1)
        return features * self.average


class Paths(Net):
    """Whole paths are dropped at random, and noise is added, in train mode."""

    def build(self) -> None:
        self.c = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x + self.c(x)
        kept = x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)
        return x + self.c(x) * kept + torch.randn_like(x)


class FixedNoise(Net):
    """A width that is written down for train mode alone."""

    def build(self) -> None:
        self.conv = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x * (1 + 0.1 * torch.randn(len(x), 12, 1, 1)) if self.training else x


class Bank(Net):
    """A bank that train mode writes features to."""

    def build(self) -> None:
        self.conv = block(12, 12)
        self.register_buffer("bank", torch.zeros(9, 12))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.training:
            self.bank[: len(x)] = x.detach().mean((2, 3))
        return x


class _TwelveWide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x * 2

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * torch.full((12, 1, 1), 2.0)


class FixedBackward(Net):
    """A width that is written down for the backward pass alone."""

    def build(self) -> None:
        self.conv = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return _TwelveWide.apply(x) if self.training else x * 2


CUTTABLE = [
    Halves, Quarters, Plain, Centres, Queue, MovingAverage, Paths,
    Residual, PreActivation, Dense, Gate, Gated, Parts, Grouped, ShuffledGroups, PaddedShortcut,
    Scaled, Shared, Functional, Reparameterised, Flattened, Places, SpatialGate, SelectiveKernels,
    Normalised, EfficientAttention,
]  # fmt: skip
# networks, and layers of which nothing may be cut
LEFT_ALONE = {
    FixedHalves: "conv.0", OddSlices: "conv.0", FixedNoise: "conv.0", Bank: "conv.0",
    FixedBackward: "conv.0",
    FixedView: "conv.0", FixedSplit: "conv.0",
    Written: "conv.0", Custom: "conv.0",
    Measured: "conv.0", Counted: "conv.0", AcrossChannels: "conv.0",
}  # fmt: skip


class Inherited(nn.BatchNorm2d):
    pass


class Norms(nn.Module):
    """BatchNorms of every kind, each followed by operations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(4),
                nn.BatchNorm2d(4, momentum=None),
                nn.BatchNorm2d(4, affine=False),
                nn.BatchNorm2d(4, track_running_stats=False),
                Inherited(4),
            ]
        )
        self.norms.append(self.norms[0])
        self.deep, self.line, self.flat = nn.BatchNorm3d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for norm in self.norms:
            y = norm(x)
            y += x
            x = torch.relu_(y)
        x = torch.relu_(self.deep(x[:, :, None]))[:, :, 0]
        x = torch.relu_(self.line(x.flatten(2))).mean(2)
        return self.last(torch.relu_(self.flat(x)))


class Streams(nn.Module):
    """Eight channels, read by two layers; one of them reads two copies of each, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.also, self.also_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.one, self.other = nn.Conv2d(8, 5, 1), nn.Conv2d(20, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.norm(self.stem(x)), F.relu(self.also_norm(self.also(x)))
        return self.one(F.relu(y)) + self.other(torch.cat([F.relu(y), torch.tanh(y), z], 1))
