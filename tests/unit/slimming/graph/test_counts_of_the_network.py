"""Attributes of the network itself that count channels follow a cut, as those of its parts do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.artifacts.model_card import ModelCard, load_model, save_model
from job.data.preprocessing import Preprocessing
from support.cuts import randomise
from support.masked import halve
from support.networks import Net, block

IMAGE = torch.rand(1, 3, 20, 28)


class Split(Net):
    def build(self) -> None:
        self.half, self.conv = 12, block(12, 24)
        self.left, self.right = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.split(self.conv(x), self.half, 1)
        return self.left(left) + self.right(right)


class Viewed(Net):
    def build(self) -> None:
        self.conv, self.count, self.out = block(12, 24), 24, 24 * 4
        self.head = nn.Linear(self.out, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(self.conv(self.stem(images)), 2)
        return self.head(x.view(-1, self.count * 4))


@pytest.mark.parametrize(("kind", "attribute"), [(Split, "half"), (Viewed, "count")])
def test_they_are_counted_again_and_saved(
    kind: type[Net], attribute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    wide = randomise(kind())
    before = getattr(wide, attribute)
    narrow, plan = halve(wide, IMAGE)
    assert getattr(narrow, attribute) == before // 2
    assert getattr(wide, attribute) == before
    assert {b.layer for b in plan.blocked} == {"head"}
    monkeypatch.setitem(sys.modules, "counted", SimpleNamespace(net=lambda num_classes: kind()))
    card = ModelCard("counted:net", {}, 5, preprocessing=Preprocessing.of("small", 28))
    save_model(tmp_path / "model", narrow, card.cut(plan.layers, 0.5))
    loaded, _ = load_model(tmp_path / "model")
    assert getattr(loaded, attribute) == before // 2
    torch.testing.assert_close(loaded(IMAGE), narrow(IMAGE), rtol=0, atol=0)
    again, _ = job.slim(loaded, IMAGE, target="channels=0.7", min_keep=0.05)
    assert getattr(again, attribute) < before // 2
