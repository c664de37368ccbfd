"""Networks that draw random numbers in eval mode: they are proven with equal noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.slimming.surgery.constant_noise import NOISE_VALUE, ConstantNoise

Noise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

NOISES: dict[str, Noise] = {
    "like": lambda mean, std: mean + std * torch.randn_like(std),
    "shape": lambda mean, std: mean + std * torch.randn(std.shape, dtype=std.dtype),
    "in place": lambda mean, std: mean + std * std.new_empty(std.size()).normal_(),
    "zeros": lambda mean, std: mean + std * torch.zeros_like(std).uniform_(),
    "normal": torch.normal,
    "distribution": lambda mean, std: torch.distributions.Normal(mean, std).rsample(),
    "dropout": lambda mean, std: F.dropout(mean, 0.5, training=True) * std,
    "mask": lambda mean, std: mean * torch.empty(len(std), 1, 1, 1).bernoulli_(0.9) / std,
    "bernoulli": lambda mean, std: mean + torch.bernoulli(std.clamp(0, 1)),
    "given": lambda mean, std: torch.bernoulli(mean, 0.5) + std,
}
UNCUT: dict[str, Noise] = {  # the noise has as many channels as the code says
    "literal": lambda mean, std: mean + std * torch.randn(8, 1, 1),
    "Gumbel": lambda mean, std: F.gumbel_softmax(mean, dim=1) + std,
    "hard Gumbel": lambda mean, std: F.gumbel_softmax(mean, hard=True, dim=1) + std,
}


class Sampled(nn.Module):
    """A variational autoencoder whose code has 8 channels."""

    def __init__(self, sample: Noise) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU())
        self.mean, self.log_variance = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 1)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 12, 2, 2), nn.ReLU(), nn.Conv2d(12, 3, 1)
        )
        self.sample = sample

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.encoder(images)
        std = (self.log_variance(features) / 2).exp()
        return self.decoder(self.sample(self.mean(features), std))


def cut(sample: Noise) -> nn.Module:
    example = torch.rand(1, 3, 8, 8)
    narrow, plan = job.slim(Sampled(sample).eval(), example, policy="uniform", target="width=0.5")
    assert plan.proof is not None
    assert plan.proof.error < 1e-12
    return narrow


@pytest.mark.parametrize("kind", NOISES)
def test_channels_with_noise_are_cut(kind: str) -> None:
    narrow = cut(NOISES[kind])
    assert narrow.get_submodule("mean").out_channels == 4
    assert narrow(torch.rand(2, 3, 8, 8)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("kind", UNCUT)
def test_noise_with_a_fixed_number_of_channels_keeps_them(kind: str) -> None:
    narrow = cut(UNCUT[kind])
    assert narrow.get_submodule("mean").out_channels == 8
    assert narrow.get_submodule("encoder.0").out_channels == 6


def test_noise_in_train_mode_alone_is_proven_too() -> None:
    class Loss(Sampled):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) if self.training else self.encoder(images).mean((1, 2))

    wide = Loss(NOISES["like"]).eval()
    narrow, _ = job.slim(wide, torch.rand(1, 3, 8, 8), policy="uniform", target="width=0.5")
    assert narrow.get_submodule("mean").out_channels == 4
    assert narrow.train()(torch.rand(2, 3, 8, 8)).shape == (2, 3, 8, 8)


def test_random_indices_are_drawn_alike() -> None:
    def tokens(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(mean.shape[2])
        return mean[:, :, order] + std * torch.rand(len(std), std.shape[1], 1, 1)

    assert cut(tokens).get_submodule("encoder.0").out_channels == 6


def test_constants_stand_for_noise_and_the_generator_does_not_advance() -> None:
    torch.manual_seed(0)
    expected = torch.randperm(8)
    torch.manual_seed(0)
    with ConstantNoise():
        assert (torch.rand(3) == NOISE_VALUE).all()
        assert torch.equal(torch.normal(torch.ones(2), torch.ones(2)), torch.full((2,), 1.5))
        assert torch.normal(0.0, 1.0, (2, 2)).tolist() == [[NOISE_VALUE] * 2] * 2
        assert torch.equal(F.dropout(torch.ones(3), 0.9, training=True), torch.ones(3))
        chosen = F.gumbel_softmax(torch.tensor([0.0, 2.0]), hard=True, dim=0)
        assert chosen.tolist() == [0, 1]
        assert torch.equal(torch.randperm(8), expected)
