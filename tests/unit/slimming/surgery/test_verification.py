"""Networks that do not run in float64 are cut, and proven in the precision that they have."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import job
from job.errors import GammaslimError, UsageError
from job.slimming.surgery import probe_pass
from job.slimming.surgery.verification import verify
from support.cuts import randomise
from support.networks import Net, Residual, block

IMAGE = torch.rand(1, 3, 20, 28)


class ToFloat(Residual):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.float())


class FloatAtTheEnd(Residual):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).float()


class Typed(Net):
    """A table whose type is written down, and an operation that only takes that."""

    def build(self) -> None:
        self.c = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.linspace(0, 1, x.shape[-1], dtype=torch.float32, device=x.device)
        return self.c(x + (x.flatten(0, 2) @ table).view(*x.shape[:3], 1))


@pytest.mark.parametrize("kind", [ToFloat, FloatAtTheEnd])
def test_a_network_in_float32_alone_is_proven_in_float32(
    kind: type[Net], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = randomise(kind())
    narrow, plan = job.slim(network, IMAGE)
    assert plan.proof.precision == "float32"
    said = capsys.readouterr().err
    assert "does not run in float64: the cut is exact to" in said
    assert f"in float32, where {plan.proof.tolerance:.0e} is allowed" in said
    assert 1e-7 < plan.proof.tolerance < 1e-3
    assert plan.proof.error <= plan.proof.tolerance
    assert narrow(IMAGE).dtype == torch.float32
    wrong = copy.deepcopy(narrow)
    with torch.no_grad():
        wrong.get_parameter("one.0.weight")[0] += 0.05
    with pytest.raises(GammaslimError, match=r"the cut is wrong: .* in float32, where .* is"):
        verify(network, wrong, plan.layers, IMAGE)


class Magnifying(ToFloat):
    """The last bits of its weights in float32 decide its outputs."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (super().forward(images) * 1e9).sin()


class OfFloatAlone(Magnifying):
    """As above, and the code fails where it is computed in float64."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(images)
        if outputs.dtype != torch.float32:
            raise TypeError("not float32")
        return outputs


def test_a_tolerance_that_passes_everything_proves_nothing() -> None:
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=r"the rounding of the weights alone changes .* float32"):
        job.slim(randomise(OfFloatAlone()), IMAGE)


def test_what_float32_would_hide_is_proven_in_float64() -> None:
    torch.manual_seed(0)
    network = randomise(Magnifying())
    narrow, plan = job.slim(network, IMAGE)
    assert plan.proof.precision == "float64"
    assert plan.proof.error <= plan.proof.tolerance <= 1e-6
    with torch.no_grad():
        narrow.get_parameter("one.0.weight")[0] += 1e-5
    with pytest.raises(GammaslimError, match=r"the cut is wrong: .* in float64, where .* is"):
        verify(network, narrow, plan.layers, IMAGE)


class FloatWithin(Net):
    """Attention in float32, whose scale depends on the width, in a network of float64."""

    def build(self) -> None:
        self.query, self.key, self.value = (nn.Conv2d(12, 12, 1) for _ in range(3))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        parts = (part(x).flatten(2).mT.float() for part in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(*parts)
        return x + y.mT.reshape(x.shape).to(x.dtype)


def test_attention_in_float32_is_compared_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = randomise(FloatWithin())
    _, plan = job.slim(network, IMAGE, importance="l2", target="channels=0.5")
    assert "query" in plan.layers
    assert plan.proof.precision == "float64"
    assert plan.proof.error <= 1e-12
    monkeypatch.setattr(probe_pass, "DoublePrecision", nullcontext)
    with pytest.raises(UsageError, match="cannot be reached"):  # its rounding looks like a fault
        job.slim(network, IMAGE, importance="l2", target="channels=0.5")


def test_others_are_proven_in_float64() -> None:
    _, plan = job.slim(randomise(Residual()), IMAGE)
    assert plan.proof.precision == "float64"
    assert plan.proof.error <= plan.proof.tolerance == 1e-9


def test_a_type_that_is_written_down_is_no_raw_error() -> None:
    torch.manual_seed(0)
    _, plan = job.slim(randomise(Typed()), IMAGE, target="params=0.8")
    assert plan.proof.precision == "float32"


def test_a_network_that_runs_elsewhere_alone_is_refused() -> None:
    class Picky(Residual):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if not images.is_meta:
                raise RuntimeError("no such kernel")
            return super().forward(images)

    with pytest.raises(UsageError, match="on the CPU, where the network does not run: no s"):
        job.slim(randomise(Picky()), IMAGE)


def test_a_network_that_trains_is_cut_to_one_that_trains() -> None:
    wide = randomise(Residual())
    broken = copy.deepcopy(wide)
    broken.one[0].register_forward_pre_hook(_fails_in_training)
    with pytest.raises(GammaslimError, match="does not train, as the wide one does: not in here"):
        verify(wide, broken, {}, IMAGE)
    verify(broken, broken, {}, IMAGE)  # nor did the wide one


def _fails_in_training(module: nn.Module, _: object) -> None:
    if module.training:
        raise ValueError("not in here")


class ZeroHead(nn.Module):
    """A residual block whose last BatchNorm, and a head, are initialised with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.back, self.last = nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        for layer in (self.last, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.last(self.back(torch.relu(self.inner_norm(self.inner(x)))))
        outputs: torch.Tensor = self.head(x.mean((2, 3)))
        return outputs


def test_weights_that_are_zero_hide_no_wrong_cut() -> None:
    torch.manual_seed(0)
    wide, example = ZeroHead(), torch.rand(1, 3, 16, 16)
    narrow, plan = job.slim(wide, example, target="channels=0.5", importance="l2")
    assert plan.proof is not None
    assert plan.proof.error <= plan.proof.tolerance
    assert not narrow.head.weight.any()
    assert not wide.last.weight.any()
    for layer in ("stem", "inner"):
        wrong = copy.deepcopy(narrow)
        with torch.no_grad():
            wrong.get_submodule(layer).weight[0] += 1
        with pytest.raises(GammaslimError, match="the cut is wrong"):
            verify(wide, wrong, plan.layers, example)
