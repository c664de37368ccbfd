"""Tensors that code fills for all channels: states, gates and padding are cut with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import job
from job.slimming.analysis import analyse
from support.cuts import randomise
from support.masked import masked_network

IMAGE, VIDEO = torch.rand(1, 3, 12, 12), torch.rand(1, 3, 3, 8, 8)


class LstmCell(nn.Module):
    """A cell whose state is filled by an attribute (Shi et al. 2015)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.gates = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)

    def start(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        zeros = torch.zeros(len(x), self.hidden_dim, *x.shape[2:], dtype=x.dtype)
        return zeros, zeros.clone()

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, cell = state
        gates = self.gates(torch.cat([x, hidden], dim=1))
        i, f, o, g = gates.chunk(4, 1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class ConvLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([LstmCell(3, 16), LstmCell(16, 12)])
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        images = video.unbind(1)
        for cell in self.cells:
            state, outputs = cell.start(images[0]), []
            for image in images:
                state = cell(image, state)
                outputs.append(state[0])
            images = outputs
        return self.last(images[-1])


class ConvGru(nn.Module):
    """Separate convolutions of the input and of the state, which starts from the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gates, self.new = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.of_state = nn.Conv2d(12, 24, 3, padding=1)
        self.again = nn.Conv2d(12, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        state = None
        for image in video.unbind(1):
            x = self.norm(self.embed(image)).relu()
            new = self.new(x)
            state = new.new_zeros(new.shape) if state is None else state
            z, r = (self.gates(x) + self.of_state(state)).sigmoid().chunk(2, 1)
            state = (1 - z) * state + z * torch.tanh(new + self.again(r * state))
        return self.last(state)


class SpatialGate(nn.Module):
    """A map for all channels, expanded as in BAM (Park et al. 2018), by sizes, or repeated."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.place = nn.Conv2d(16, 1, 3, padding=1)
        self.last = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        b, c, h, w = x.shape
        channel = self.excite(self.squeeze(x.mean((2, 3))).relu())[:, :, None, None].expand_as(x)
        place = {
            "expand_as": lambda: self.place(x).expand_as(x),
            "expand": lambda: torch.sigmoid(self.place(x)).expand(b, c, h, w),
            "repeat": lambda: self.place(x).repeat(1, c, 1, 1) + torch.ones(b, c, h, w).to(x),
        }[self.how]()
        return self.last((x * (1 + torch.sigmoid(channel * place))).mean((2, 3)))


class PaddedByZeros(nn.Module):
    """A shortcut that zeros fill up to more channels (option A of He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.second, self.last = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        y = self.second(x)
        zeros = torch.zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:], dtype=x.dtype)
        return self.last((y + torch.cat([x, zeros], 1)).relu().mean((2, 3)))


NETWORKS = {
    "a state by an attribute": (ConvLstm, VIDEO, 0.28),
    "a state by the input": (ConvGru, VIDEO, 0.28),
    "expand_as": (lambda: SpatialGate("expand_as"), IMAGE, 0.5),
    "expand": (lambda: SpatialGate("expand"), IMAGE, 0.5),
    "repeat": (lambda: SpatialGate("repeat"), IMAGE, 0.5),
    "zeros beside a stream": (PaddedByZeros, IMAGE, 0.33),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_code_fills_is_cut_with_the_channels_it_meets(name: str) -> None:
    build, example, share = NETWORKS[name]
    torch.manual_seed(0)
    wide = randomise(build()).double()
    narrow, plan = job.slim(wide, example, policy="uniform", target="width=0.5", importance="l2")
    assert plan.after.params <= share * plan.before.params
    inputs = torch.rand(3, *example.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(narrow(inputs), masked_network(wide, plan.layers)(inputs))
    narrow.train()(inputs).square().sum().backward()


def test_a_number_in_the_code_blocks_what_it_fills() -> None:
    class Sixteen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.place = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 1, 1)
            self.last = nn.Conv2d(16, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(x * self.place(x).expand(-1, 16, -1, -1))

    blocked = {b.layer: b for b in analyse(Sixteen(), IMAGE).blocked}
    assert blocked["first"].reason == "expand works only for the current number of channels"
    assert blocked["first"].place.startswith("test_blank_channels.py")


def test_zeros_that_no_layer_makes_later_are_never_cut() -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(12, 5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(torch.cat([x, torch.zeros(len(x), 4, *x.shape[2:]).to(x)], 1))

    _, plan = job.slim(Zeros().eval(), IMAGE, target="channels=0.5", importance="l2")
    assert plan.layers["last"].in_ is not None
    assert set(range(8, 12)) < set(plan.layers["last"].in_)


class CostVolume(nn.Module):
    """Maps of two views, assigned to a volume of zeros at each disparity (Chang and Chen 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1)
        self.volume, self.last = nn.Conv3d(16, 6, 1), nn.Conv3d(6, 4, 1)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        left, right = (self.two(self.one(x).relu()) for x in (left, right))
        batch, channels, height, width = left.shape
        cost = left.new_zeros([batch, 2 * channels, 3, height, width])
        for shift in range(3):
            if shift:
                cost[:, :channels, shift, :, shift:] = left[:, :, :, shift:]
                cost[:, channels:, shift, :, shift:] = right[:, :, :, :-shift]
            else:
                cost[:, :channels, shift] = left
                cost[:, channels:, shift] = right
        return self.last(self.volume(cost.contiguous()).relu())


def test_zeros_that_maps_are_assigned_to_are_cut_with_them() -> None:
    torch.manual_seed(0)
    wide, views = CostVolume().double().eval(), torch.rand(2, 2, 3, 8, 8).double()
    narrow, plan = job.slim(
        wide, tuple(views), policy="uniform", target="width=0.5", importance="l2"
    )
    assert {blocked.layer for blocked in plan.blocked} == {"last"}
    assert (narrow.two.out_channels, narrow.volume.in_channels) == (4, 8)
    masked = masked_network(wide, plan.layers)
    torch.testing.assert_close(narrow(*views), masked(*views))


def test_a_constant_channel_made_like_one_of_the_maps_is_kept_beside_them() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(9, 6, 3)
            self.last = nn.Conv2d(6, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            time = torch.ones_like(x[:, :1]) * 0.3
            return self.last(self.second(torch.cat([time, x], 1)).relu())

    torch.manual_seed(0)
    wide = Timed().double().eval()
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert (narrow.first.out_channels, narrow.second.in_channels) == (4, 5)
    images = torch.rand(2, *IMAGE.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))


def test_zeros_that_a_parameter_scales_are_cut_with_the_state() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
            self.decay = nn.Parameter(torch.rand(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x)
            state = torch.zeros(x.size(0), x.size(-1), dtype=x.dtype)
            for place in range(x.shape[1]):
                state = self.decay * state + x[:, place]
            return self.last(state)

    example = torch.rand(2, 5, 6, dtype=torch.float64)
    narrow, plan = job.slim(
        Leaky().double().eval(), example, policy="uniform", target="width=0.5", importance="l2"
    )
    assert (narrow.enter.out_features, narrow.decay.shape) == (8, (8,))
    assert plan.proof.error <= 1e-12


class WrittenZeros(nn.Module):
    """Zeros for as many channels as the code says."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(24, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = x.new_zeros(len(x), 12, *x.shape[2:])
        x = self.one(x).relu()
        return self.last(self.two(torch.cat([x + zeros, zeros + x], 1)).relu())


def test_the_line_that_fills_a_tensor_is_named() -> None:
    torch.manual_seed(0)
    _, plan = job.slim(randomise(WrittenZeros()), IMAGE, target="params=0.8")
    (blocked,) = (each for each in plan.blocked if each.layer == "one")
    line = WrittenZeros.forward.__code__.co_firstlineno + 1
    assert "new_zeros" in blocked.explanation
    assert f"(test_blank_channels.py:{line})" in blocked.explanation
