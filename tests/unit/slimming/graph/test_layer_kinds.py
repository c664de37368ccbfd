"""Layers beyond convolutions and BatchNorm: each kind is cut and equals the masked network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F

import job
from job.slimming.analysis import analyse
from support.cuts import randomise
from support.masked import halve
from support.networks import Net, block


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one, self.two = block(inputs, outputs), block(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


class UNet(nn.Module):
    """Three levels; the decoder's maps are padded to the size of the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Stage(3, 8), Stage(8, 12), Stage(12, 16)])
        self.ups = nn.ModuleList(
            [nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ConvTranspose2d(12, 8, 2, stride=2)]
        )
        self.joined = nn.ModuleList([Stage(24, 12), Stage(16, 8)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for number, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if number else x)
            skips.append(x)
        for up, stage, skip in zip(self.ups, self.joined, skips[1::-1], strict=True):
            x = up(x)
            high, wide = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = stage(torch.cat([skip, F.pad(x, [wide // 2, wide - wide // 2, 0, high])], 1))
        return self.head(x)


def test_a_unet_with_transposed_convolutions_is_cut() -> None:
    torch.manual_seed(0)
    network, image = randomise(UNet()), torch.rand(1, 3, 21, 27)
    narrow, plan = halve(network, image)
    assert [(up.in_channels, up.out_channels) for up in narrow.ups] == [(8, 6), (6, 4)]
    assert plan.after.params < 0.28 * plan.before.params
    assert {blocked.layer for blocked in plan.blocked} == {"head"}


class Upsampled(Net):
    """A transposed convolution of ``dims`` dimensions between two blocks."""

    def __init__(self, dims: int, **options: Any) -> None:
        self.dims, self.options = dims, {"kernel_size": 3, "stride": 2, **options}
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.stem = nn.Sequential(kind(3, 12, 3), nn.ReLU())

    def build(self) -> None:
        kinds = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
        outputs = self.options.pop("outputs", 18)
        self.up = kinds[self.dims - 1](12, outputs, **self.options)
        self.after = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1](outputs, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.after(self.up(self.stem(x)).relu()).relu().flatten(2).mean(2))


UPSAMPLED = [
    (1, {}, (6, 9, 1)),
    (2, {"output_padding": 1, "padding": 1}, (6, 9, 1)),
    (3, {"bias": False}, (6, 9, 1)),
    (2, {"groups": 3}, (6, 9, 3)),
    (2, {"dilation": 2, "groups": 2, "outputs": 12}, (6, 6, 2)),
    (2, {"groups": 12, "outputs": 12}, (6, 6, 6)),  # depthwise
    (1, {"groups": 12, "outputs": 24}, (6, 12, 6)),
]


@pytest.mark.parametrize(("dims", "options", "sizes"), UPSAMPLED)
def test_transposed_convolutions_of_every_shape_are_cut(
    dims: int, options: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    example = torch.rand(2, 3, *(9, 7, 8)[:dims])
    narrow, _ = halve(Upsampled(dims, **options).eval(), example)
    up = narrow.up
    assert (up.in_channels, up.out_channels, up.groups) == sizes
    assert up.weight.shape[:2] == (sizes[0], sizes[1] // sizes[2])


@pytest.mark.parametrize("compensate", ["mean", "regress"])
def test_a_cut_before_a_transposed_convolution_is_compensated(compensate: str) -> None:
    torch.manual_seed(0)
    network, images = randomise(UNet()), torch.rand(24, 3, 16, 16)
    with torch.no_grad():
        wanted = network(images)
        errors = []
        for how in ("none", compensate):
            narrow, _ = job.slim(
                network, images[:1], target="channels=0.7", compensate=how, calibration=[images]
            )
            errors.append(float((narrow(images) - wanted).square().mean()))
    assert errors[1] < 0.9 * errors[0]


class Sequences(nn.Module):
    """A CNN whose columns are the steps of a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.conv = nn.Sequential(block(3, 12), block(12, 8))
        self.first = options.get("batch_first", False)
        self.rnn = kind(8 * 4, 6, **options)
        self.head = nn.Linear(12 if self.rnn.bidirectional else 6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(1, 2)
        steps, _ = self.rnn(x.transpose(1, 2) if self.first else x.permute(2, 0, 1))
        return self.head(steps)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{"batch_first": True}, {"bidirectional": True, "bias": False}])
def test_channels_before_a_recurrent_layer_are_cut(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    network = randomise(Sequences(kind, **options))
    narrow, plan = halve(network, torch.rand(2, 3, 4, 9))
    assert (narrow.rnn.input_size, narrow.rnn.hidden_size) == (16, 6)
    assert narrow.rnn.weight_ih_l0.shape[1] == 16
    assert plan.layers["rnn"].in_ is not None
    images = torch.rand(24, 3, 4, 9)
    narrow, plan = job.slim(network, images[:1], target="channels=0.6", calibration=[images])
    assert plan.after.channels <= 0.6 * plan.before.channels
    assert narrow(images).isfinite().all()


class Computed(Net):
    def __init__(self, wrap: Any) -> None:
        self.wrap = wrap
        super().__init__()

    def build(self) -> None:
        self.one, self.two = self.wrap(nn.Conv2d(12, 12, 3, padding=1)), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


WRAPPED = {
    "remove_weight_norm(layer)": nn.utils.weight_norm,
    "remove_spectral_norm(layer)": nn.utils.spectral_norm,
    "remove_parametrizations(layer, 'weight')": nn.utils.parametrizations.weight_norm,
    "prune.remove(layer, 'weight')": lambda layer: nn.utils.prune.l1_unstructured(
        layer, "weight", 0.3
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", WRAPPED)
def test_a_weight_that_is_computed_is_left_alone_with_the_line_that_frees_it(line: str) -> None:
    torch.manual_seed(0)
    network = randomise(Computed(WRAPPED[line]))
    _, plan = job.slim(network, torch.rand(1, 3, 20, 28), target="channels=0.9")
    blocked = {each.layer: each for each in plan.blocked}["stem.0"]
    assert blocked.reason.startswith("a weight that is computed by ")
    assert f"{line} before the cut" in blocked.remedy
    assert str(plan).count(line.split("(")[0]) == 1


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.one = nn.Embedding(30, 6), nn.Conv1d(6, 12, 3)
        self.mix, self.head = nn.Bilinear(12, 12, 5), nn.Linear(5, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.one(self.words(words).transpose(1, 2)).relu().mean(2)
        return self.head(self.mix(x, x))


def test_every_layer_that_is_left_alone_is_named() -> None:
    torch.manual_seed(0)
    graph = analyse(Words().eval(), torch.randint(0, 30, (2, 9)))
    reasons = {blocked.layer: blocked.reason for blocked in graph.blocked}
    assert reasons.keys() == {"one", "mix", "head"}
    assert reasons["one"] == "bilinear is not supported"


def test_hidden_states_and_layers_that_no_pass_uses_are_named() -> None:
    class Spoken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.lstm = nn.Conv1d(3, 8, 3), nn.LSTM(8, 12, batch_first=True)
            self.head, self.spare = nn.Linear(12, 4), nn.Conv1d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.one(x).mT)[0][:, -1])

    graph = analyse(Spoken().eval(), torch.rand(2, 3, 9))
    reasons = {blocked.layer: blocked.reason for blocked in graph.blocked}
    assert reasons.pop("head") == "the network's output"
    assert reasons == {
        "lstm": "hidden states of recurrent layers are not cut",
        "spare": "no pass in eval mode uses it",
    }


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0 for each input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((0, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_layer_whose_weight_is_computed_is_named() -> None:
    torch.manual_seed(0)
    network = randomise(Computed(lambda conv: Standardised(12, 12, 3, padding=1)))
    graph = analyse(network, torch.rand(1, 3, 20, 28))
    reasons = {blocked.layer: blocked.reason for blocked in graph.blocked}
    assert reasons["one"].startswith("its weight is computed from others")
