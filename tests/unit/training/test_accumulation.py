"""Gradient accumulation: the gradient of the whole batch, from parts of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from job.training.micro_batches import micro_batches, part_sizes
from job.training.session import RoundSpec
from support.training import Recorder, trainer


class Sizes(nn.Module):
    """A network without BatchNorm that keeps the sizes of the batches that it is trained on."""

    seen: list[int] = []  # noqa: RUF012 (shared by copies)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64, 4),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.append(len(images))
        return self.layers(images)


def test_the_weights_are_those_of_whole_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Sizes()
    results = []
    for parts in (1, 4):
        trained, recorder = copy.deepcopy(network), Recorder()
        Sizes.seen.clear()
        training = trainer(tmp_path / str(parts), accumulate=parts, optimizer="sgd", lr=0.05)
        training.fit(trained, RoundSpec(0, 2), recorder)
        results.append((trained, recorder.epochs, list(Sizes.seen)))
    (whole, epochs, sizes), (split, split_epochs, split_sizes) = results
    assert sizes == 2 * [16, 16, 16, 16, 16, 10]
    assert split_sizes == 2 * [*[4] * 20, 3, 3, 2, 2]
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(epochs, split_epochs, strict=True):
        assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert mine.step == theirs.step  # an optimizer step for each whole batch


def test_each_process_has_two_images_in_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [micro_batches(size, 4) for size in (1, 3, 4, 5, 8, 32)] == [1, 1, 2, 2, 4, 4]
    monkeypatch.setattr("job.training.micro_batches.world_size", lambda: 3)
    for size in range(1, 100):
        parts = micro_batches(size, 4)
        assert 1 <= parts <= 4
        assert parts == 1 or (size // 3) // parts >= 2


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 3), (3, 1), (3, 2)])
def test_the_sizes_of_the_parts_are_those_of_the_batch_that_is_split(
    monkeypatch: pytest.MonkeyPatch, world: int, accumulate: int
) -> None:
    monkeypatch.setattr("job.training.micro_batches.world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr("job.training.micro_batches.rank", lambda rank=rank: rank)
        for size in (7, 16, 31, 32):
            share = torch.arange(rank, size, world)
            chunks = share.tensor_split(micro_batches(size, accumulate))
            assert part_sizes(size, accumulate) == {len(chunk) for chunk in chunks}
