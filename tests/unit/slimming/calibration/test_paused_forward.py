"""Forward passes that pause before a layer, and what ``regress`` makes of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.errors import StopRequest
from job.slimming.analysis import analyse
from job.slimming.calibration.paused_forward import contiguous_weights, forward_passes
from job.slimming.calibration.progress import Progress, no_progress
from job.slimming.compensation import paired_passes, reconstruction
from support.cuts import randomise

IMAGES = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))


BYTES = 4 * 2 * 8 * 16 * 16  # of a pass that is paused after the second convolution
RAN = itertools.count()  # passes of all networks; what they count themselves is put back


class Network(nn.Module):
    """Counts its forward passes; works in place; raises in ``fails``' place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 4)
        self.fails = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        next(RAN)
        stream = F.relu(self.norm(self.first(images)), inplace=True)
        stream = stream + F.relu(self.other(self.second(stream)), inplace=True)
        if self.fails and len(images) > 2:  # not when it is analysed
            raise ValueError("no such thing")
        found: torch.Tensor = self.last(stream.mean((2, 3)))
        return found


def network() -> Network:
    torch.manual_seed(0)
    return randomise(Network(), 1)


def slim(wide: Network, batches: list[torch.Tensor]) -> Network:
    narrow, _ = job.slim(
        wide, IMAGES[:1], importance="gamma", compensate="regress", allocate="local",
        calibration=batches,
    )  # fmt: skip
    assert isinstance(narrow, Network)
    return narrow


def test_a_pass_pauses_where_it_is_asked_to_and_sees_what_has_changed() -> None:
    wide = network()
    layers = wide.second, wide.last
    before = wide(IMAGES)
    with forward_passes(wide, layers) as start:
        passes = [start(batch) for batch in IMAGES.split(8)]
        read = [paused.run_until(wide.second) for paused in passes]
        assert [None if values is None else len(values) for values in read] == [8, 8, 4]
        with torch.no_grad():
            wide.second.weight.zero_()
        after = [paused.run_until(wide.last) for paused in passes]
        assert passes[0].run_until(wide.second) is None  # it has gone by
    changed = wide(IMAGES)
    assert not torch.allclose(before, changed)
    assert all(values is not None for values in after)
    joined = torch.cat([values for values in after if values is not None])
    torch.testing.assert_close(wide.last(joined), changed)


def test_weights_are_in_the_default_format_meanwhile() -> None:
    layers = [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 1)]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    weights = [layer.weight for layer in layers]
    strides = [weight.stride() for weight in weights]
    addresses = [weight.data_ptr() for weight in weights]
    assert strides == [(9, 1, 3, 1), (72, 1, 24, 8), (4, 1, 4, 4)]
    with contiguous_weights(network):
        inside = [(9, 9, 3, 1), (72, 9, 3, 1), (4, 1, 1, 1)]
        assert [weight.stride() for weight in weights] == inside
        with torch.no_grad():
            layers[1].weight.fill_(2)
    assert [weight.stride() for weight in weights] == strides
    assert [weight.data_ptr() for weight in weights] == addresses
    assert bool((layers[1].weight == 2).all())


def test_regress_passes_the_images_once_however_many_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    for parts in (1, 5):
        monkeypatch.setattr(paired_passes, "MAX_PAUSED_BYTES", 10**8)
        monkeypatch.setattr(paired_passes, "PARTS", 10**8 // (2 * BYTES) // (20 // parts))
        before = next(RAN)
        slim(network(), list(IMAGES.split(1)))
        counts.append(next(RAN) - before)
    assert counts[1] - counts[0] == 4 * 2  # in the narrow and in the wide network


def test_images_join_where_they_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = network()
    whole, part = slim(wide, list(IMAGES.split(5))), slim(wide, [IMAGES[:10]])
    assert not torch.allclose(whole.second.weight, part.second.weight)
    # six images and a little before the second convolution, all of them before the last layer
    monkeypatch.setattr(paired_passes, "MAX_PAUSED_BYTES", 6 * (2 * BYTES + IMAGES[0].nbytes))
    limited = slim(wide, list(IMAGES.split(5)))
    torch.testing.assert_close(limited.second.weight, part.second.weight)
    assert not torch.allclose(limited.last.weight, part.last.weight)


def test_memory_of_a_paused_pass_is_counted() -> None:
    points = analyse(network(), IMAGES).forward.pause_points
    sizes = {name: point.bytes_per_sample for name, point in points.items()}
    # after the second convolution: the stream, which is added later, and its output
    assert sizes == {"first": 4 * (3 + 8) * 16 * 16, "second": BYTES, "last": 4 * (8 + 4)}


def _fail(wide: Network) -> Progress:
    wide.fails = True
    return no_progress


def _stop(_: Network) -> Progress:
    def progress(*step: object) -> None:
        steps.append(step)
        if len(steps) == 3:
            raise StopRequest("stopped by request")

    steps: list[object] = []
    return progress


@pytest.mark.parametrize(
    ("how", "error"), [(_fail, ValueError), (_stop, StopRequest)], ids=["error", "stop"]
)
def test_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, how: Callable[[Network], Progress], error: type[BaseException]
) -> None:
    wide = network()
    progress, original = how(wide), reconstruction.reconstruct
    monkeypatch.setattr(
        "job.slimming.compensation.methods.reconstruct",
        lambda pair, batches, **_: original(pair, batches, progress=progress),
    )
    before = threading.active_count()
    with pytest.raises(error):
        slim(wide, list(IMAGES.split(4)))
    assert threading.active_count() == before
    assert not any(module._forward_pre_hooks for module in wide.modules())
