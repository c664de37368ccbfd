"""Tables that are added to channels: embeddings of positions, and constants in attributes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import job
from support.masked import masked_network

IMAGE = torch.rand(1, 3, 16, 16)


class Positions(nn.Module):
    """Patches with positions, from a layer as in CLIP, or from sines as in VideoMAE."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.hidden, self.last = nn.Linear(32, 48), nn.Linear(48, 5)
        if how == "layer":
            self.table = nn.Embedding(16, 32)
            self.register_buffer("places", torch.arange(16)[None], persistent=False)
        else:
            self.sines = torch.sin(torch.arange(16.0)[:, None] * torch.rand(32))[None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).mT
        if self.how == "layer":
            x = x + self.table(self.places)
        else:
            x = x + self.sines.detach().type_as(x).to(device=x.device, copy=True)
        return self.last(self.hidden(x).relu().mean(1))


@pytest.mark.parametrize("how", ["layer", "sines"])
def test_a_table_is_cut_with_the_channels_that_it_is_added_to(how: str) -> None:
    torch.manual_seed(0)
    wide = Positions(how).double().eval()
    before = {name: id(value) for name, value in vars(wide).items()}
    narrow, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5", importance="l2")
    if how == "layer":
        assert (narrow.table.embedding_dim, narrow.table.weight.shape) == (16, (16, 16))
    else:
        assert (narrow.sines.shape, wide.sines.shape) == ((1, 16, 16), (1, 16, 32))
    assert before == {name: id(value) for name, value in vars(wide).items()}
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(narrow(images), masked_network(wide, plan.layers)(images))
    assert job.apply(Positions(how).double().eval(), plan)(images).shape == (3, 5)
