"""Fourier transforms of maps, and complex numbers: channels are cut through them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import job
from support.cuts import randomise
from support.masked import masked_network
from support.transformer import zeroed_outputs

IMAGE = torch.rand(1, 3, 32, 32)
DIM = 16


class GlobalFilter(nn.Module):
    """Tokens filtered by complex weights in the Fourier domain (Rao et al. 2021, GFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Conv2d(3, DIM, 4, 4), nn.Linear(DIM, 5)
        self.complex_weight = nn.Parameter(torch.randn(8, 5, DIM, 2) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.enter(x).flatten(2).mT
        maps = tokens.view(len(x), 8, 8, -1)
        spectrum = torch.fft.rfft2(maps, dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.complex_weight)
        maps = torch.fft.irfft2(spectrum, s=(8, 8), dim=(1, 2), norm="ortho")
        return self.head((tokens + maps.reshape(tokens.shape)).mean(1))


class FourierUnit(nn.Module):
    """A convolution of real and imaginary parts (Chi et al. 2020, LaMa)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Conv2d(3, DIM, 3, padding=1), nn.Conv2d(DIM, 5, 1)
        self.conv, self.bn = nn.Conv2d(2 * DIM, 2 * DIM, 1), nn.BatchNorm2d(2 * DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).relu()
        spectrum = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        parts = torch.stack((spectrum.real, spectrum.imag), dim=-1).permute(0, 1, 4, 2, 3)
        parts = self.bn(self.conv(parts.reshape(len(x), -1, *parts.shape[3:]))).relu()
        parts = parts.view(len(x), -1, 2, *parts.shape[2:]).permute(0, 1, 3, 4, 2)
        spectrum = torch.complex(parts[..., 0], parts[..., 1])
        return self.head(x + torch.fft.irfftn(spectrum, s=x.shape[-2:], dim=(-2, -1), norm="ortho"))


class AsReal(GlobalFilter):
    """Complex numbers as pairs and back, transformed along one axis after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.fft(torch.fft.fft(self.enter(x), dim=3), None, -2)
        pairs = torch.view_as_real(spectrum).relu()
        maps = torch.fft.ifftn(torch.view_as_complex(pairs), s=(8, 8)).real
        return self.head(maps.mean((2, 3)))


@pytest.mark.parametrize("make", [GlobalFilter, FourierUnit, AsReal])
def test_channels_are_cut_through_transforms_of_maps(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    wide = randomise(make())
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    assert {blocked.layer for blocked in plan.blocked} <= {"head", "", "complex_weight"}
    assert narrow.enter.out_channels == DIM // 2
    if make is FourierUnit:
        assert (narrow.conv.in_channels, narrow.conv.out_channels) == (DIM, DIM)
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    without = masked_network(zeroed_outputs(wide, plan), plan.layers).double()
    torch.testing.assert_close(narrow.double()(images), without(images))


@pytest.mark.parametrize(("name", "dim"), [("fft", 1), ("fft2", (1, 2)), ("fftn", None)])
def test_transforms_along_channels_are_left_alone(name: str, dim: object) -> None:
    class Mixed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            transformed: torch.Tensor = getattr(torch.fft, name)(self[1](self[0](x)), dim=dim)
            return self[2](transformed.real)

    layers = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
    narrow, plan = job.slim(
        Mixed(*layers), IMAGE, policy="uniform", target="width=0.5", importance="l2"
    )
    assert [layer.out_channels for layer in narrow] == [4, 8, 4]
    (blocked,) = (b for b in plan.blocked if b.layer == "1")
    assert blocked.explanation.startswith(f"fft_{name} across channels is not supported (test_four")
