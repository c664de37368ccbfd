"""The garbage collector during a cut."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import job
from job.errors import UsageError
from job.slimming.new_objects import collecting_new_objects


@pytest.fixture(autouse=True)
def _nothing_is_frozen() -> Iterator[None]:
    """As in a user's process; that of the tests has frozen what they import (conftest.py)."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_old_objects_are_left_to_later_collections() -> None:
    with collecting_new_objects():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_objects_that_the_user_froze_stay_frozen() -> None:
    gc.freeze()
    with collecting_new_objects():
        pass
    assert gc.get_freeze_count() > 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_cut_leaves_the_collector_as_it_was(fails: bool) -> None:
    class Network(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if fails:
                raise ValueError("not today")
            return super().forward(images)

    network = Network(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    if fails:
        with pytest.raises(UsageError):
            job.slim(network, torch.rand(1, 3, 16, 16))
    else:
        job.slim(network, torch.rand(1, 3, 16, 16))
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()
