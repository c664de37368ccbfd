"""Networks that take several inputs, or integers, and that give other things than logits."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import job
from job.errors import DataError, GammaslimError, UsageError
from job.slimming.surgery.comparison import relative_difference
from job.slimming.surgery.verification import verify
from support.cuts import randomise


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Trunk(nn.Module):
    """Two blocks and a head: 8 and 12 channels, 3 logits."""

    def __init__(self, finish: Callable[[torch.Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.one, self.two, self.head = block(3, 8), block(8, 12), nn.Linear(12, 3)
        self.finish = finish

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(images)).mean((2, 3)))

    def forward(self, images: torch.Tensor) -> Any:
        return self.finish(self.logits(images))


class Pair(Trunk):
    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return (self.logits(left) - self.logits(right)).abs() * scale


class Batched(Trunk):
    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"logits": self.logits(batch["image"])}


class Listed(Trunk):
    def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.logits(image[None])[0] for image in images]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 6), nn.Linear(10, 3)
        self.body = nn.Sequential(
            nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Conv1d(8, 10, 3, padding=1), nn.BatchNorm1d(10), nn.ReLU(),
        )  # fmt: skip

    def forward(self, words: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        embedded = self.embedding(words)
        if mask is not None:
            embedded = embedded * mask[:, :, None]
        return self.head(self.body(embedded.transpose(1, 2)).amax(2))


NAN, INF = math.nan, math.inf
IMAGE = torch.rand(1, 3, 16, 16)
MACS = 16 * 16 * (3 * 8 + 8 * 12) * 9 + 12 * 3  # of one image through Trunk
WORDS = torch.randint(0, 30, (2, 9))


def network(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make())


@pytest.mark.parametrize(
    ("make", "example", "images"),
    [
        (Pair, (IMAGE, IMAGE), 2),
        (Pair, [IMAGE, IMAGE, 0.5], 2),
        (Pair, {"left": IMAGE, "right": IMAGE, "scale": 2.0}, 2),
        (Batched, {"image": IMAGE}, 1),
        (Batched, ({"image": IMAGE.expand(5, -1, -1, -1)},), 1),
        (Listed, [IMAGE[0], IMAGE[0]], 2),
        (Pair, (IMAGE, IMAGE, torch.tensor([0.5])), 2),
        (Trunk, IMAGE.double(), 1),
    ],
)
def test_an_example_may_be_several_inputs(make: type[nn.Module], example: Any, images: int) -> None:
    narrow, plan = job.slim(network(make), example, policy="uniform", target="width=0.5")
    assert plan.before.macs == images * MACS
    assert narrow.get_parameter("two.0.weight").shape[:2] == (6, 4)


@pytest.mark.parametrize(
    "example", [WORDS, (WORDS, None), {"words": WORDS, "mask": torch.ones(2, 9, dtype=torch.bool)}]
)
def test_words_may_be_the_input(example: Any) -> None:
    narrow, plan = job.slim(
        network(Words), example, target="macs=0.5", importance="refit", compensate="regress",
        calibration=[(example, torch.zeros(2, dtype=torch.int64))] * 3,
    )  # fmt: skip
    assert plan.after.macs <= 0.5 * plan.before.macs
    assert narrow(WORDS).isfinite().all()


@dataclass
class Detections:
    logits: torch.Tensor
    note: str = "a dataclass"


Named = namedtuple("Named", "logits more")
OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "dataclass": Detections,
    "booleans": lambda y: {"logits": y, "sure": y > 0.2},
    "no boxes": lambda y: OrderedDict(logits=y, boxes=y[:0]),
    "-inf": lambda y: y.masked_fill(torch.arange(3, device=y.device) == 2, -INF),
    "named": lambda y: Named(y, None),
    "classes": lambda y: (y, [y.argmax(1)]),
    "namespace": lambda y: SimpleNamespace(logits=y),
    "complex": lambda y: torch.complex(y, -y),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_many_kinds_are_compared(name: str) -> None:
    wide = network(lambda: Trunk(OUTPUTS[name]))
    _, plan = job.slim(wide, IMAGE, policy="uniform", target="width=0.5")
    assert plan.after.channels == 10
    wrong = copy.deepcopy(wide)
    wrong.get_parameter("head.bias").data[0] += 1e-6
    with pytest.raises(GammaslimError, match="the cut is wrong"):
        verify(wide, wrong, {}, IMAGE)


@pytest.mark.parametrize(
    ("ours", "theirs", "apart"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5), ([-INF, 2.0], [-INF, 4.0], 0.5),
        ([NAN, 2.0], [NAN, 2.0], 0.0), ([INF, 2.0], [-INF, 2.0], INF),
        ([2.0, NAN], [NAN, 2.0], INF), ([NAN, 2.0], [1.0, 2.0], INF), ([NAN, 1.0], [INF, 1.0], INF),
        ([NAN, NAN], [NAN, NAN], INF), ([True, False], [True, True], INF), ([3, 4], [3, 4], 0.0),
        ([], [], INF), ([1.0], [1.0, 1.0], INF), ([1.0, 0.0], [1, 0], INF), ([0.0], [0.0], 0.0),
        ([1.0], [0.0], INF),
    ],
)  # fmt: skip
def test_differences_are_told_apart(ours: Any, theirs: Any, apart: float) -> None:
    assert relative_difference([torch.tensor(ours)], [torch.tensor(theirs)]) == apart
    assert relative_difference([torch.ones(1)] * 2, [torch.ones(1)]) == INF


UNSURE = {
    "its forward pass calls randint": lambda y: (torch.seed(), y + torch.randint(1 << 30, (1,)))[1],
    "returns no finite number": lambda y: y * NAN,
    "returns no tensor with values": lambda _: None,
}


@pytest.mark.parametrize("message", UNSURE)
def test_a_network_that_cannot_be_compared_is_told_why(message: str) -> None:
    with pytest.raises(UsageError, match=message):
        job.slim(network(lambda: Trunk(UNSURE[message])), IMAGE)


def test_a_single_number_for_each_sample_needs_an_example_of_two() -> None:
    class Masked(Trunk):
        def forward(self, images: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.logits(images), lengths[:, None]], 1)

    wide = network(Masked)
    with pytest.raises(UsageError, match="give an example of two samples"):
        job.slim(wide, (IMAGE[:1], torch.tensor([5])))
    narrow, _ = job.slim(wide, (IMAGE[:1].expand(2, -1, -1, -1), torch.tensor([5, 4])))
    assert narrow.get_submodule("one.0").out_channels < 8


def test_taylor_takes_the_logits_among_the_outputs() -> None:
    wide = network(lambda: Trunk(lambda y: {"boxes": y[:, 0], "logits": y}))
    images = torch.rand(4, 3, 16, 16)
    given = {"importance": "taylor", "compensate": "none"}
    _, plan = job.slim(wide, IMAGE, calibration=[(images, torch.arange(4) % 3)], **given)
    assert plan.method == "importance taylor, compensation none"
    for finish, label, message in (
        (lambda y: y, 3, "label 3 is out of range for the network's 3 classes"),
        (lambda y: y[:, 0], 0, "needs a network that returns logits"),
    ):
        other = network(partial(Trunk, finish))
        batches = [(images, torch.full((4,), label))]
        with pytest.raises(UsageError, match=message):
            job.slim(other, IMAGE, calibration=batches, **given)


@pytest.mark.parametrize("name", ["two.0.weight", "two.1.weight", "two.1.running_var"])
def test_a_damaged_weight_is_named(name: str) -> None:
    wide = network(Trunk)
    wide.state_dict()[name].view(-1)[1] = NAN
    with pytest.raises(DataError, match=f"{name} of the network contains NaN"):
        job.slim(wide, IMAGE)


class Nested:
    """Tensors and a mask in an object, as the batches and answers of DETR are."""

    def __init__(self, tensors: Any, mask: torch.Tensor | None = None) -> None:
        self.tensors, self.mask, self.parent = tensors, mask, self


class Slotted:
    __slots__ = ("tensors",)

    def __init__(self, tensors: torch.Tensor) -> None:
        self.tensors = tensors


@dataclass(frozen=True)
class Frozen:
    tensors: torch.Tensor
    sizes: tuple[int, ...] = (1, 2)


class OfObjects(Trunk):
    def forward(self, batch: Any) -> Any:
        return Nested([Slotted(self.logits(batch.tensors))])


@pytest.mark.parametrize("kind", [Nested, Slotted, Frozen, lambda t: SimpleNamespace(tensors=t)])
@pytest.mark.parametrize("alone", [True, False])
def test_inputs_and_outputs_may_be_objects_that_hold_tensors(kind: Any, alone: bool) -> None:
    wide = network(OfObjects)
    example = kind(torch.rand(2, 3, 16, 16))
    batches = [kind(torch.rand(4, 3, 16, 16)) for _ in range(2)]
    narrow, plan = job.slim(
        wide, example if alone else (example,), calibration=batches, target="channels=0.6"
    )
    assert plan.proof.precision == "float64"
    assert plan.before.macs == job.slim(network(Trunk), example.tensors[:1])[1].before.macs
    assert narrow(batches[0]).tensors[0].tensors.shape == (4, 3)
    assert example.tensors.dtype == torch.float32


class Features(Trunk):
    def forward(self, images: torch.Tensor) -> Any:
        return self.logits(images), Nested(self.one(images))


def test_channels_that_are_returned_in_an_object_are_not_cut() -> None:
    _, plan = job.slim(network(Features), IMAGE, target="channels=0.8")
    assert {b.layer for b in plan.blocked} == {"one.0", "head"}


def test_a_batch_of_one_input_fits_an_example_in_a_tuple() -> None:
    narrow, _ = job.slim(network(Trunk), (IMAGE,), calibration=[IMAGE.expand(6, -1, -1, -1)])
    assert narrow(IMAGE).shape == (1, 3)


class Labelled(nn.Module):
    """A network of noise and classes, as the generator of a conditional GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.noise, self.last = (
            nn.Embedding(10, 8),
            nn.Linear(4, 24),
            nn.Linear(32, 3),
        )

    def forward(self, noise: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.noise(noise).relu(), self.classes(classes)], 1))


def test_a_network_of_noise_and_classes_is_saved(tmp_path: Path) -> None:
    example = torch.rand(2, 4), torch.tensor([1, 3])
    narrow, plan = job.slim(randomise(Labelled()), example, target="params=0.6")
    assert [len(part) for part in plan.example] == [2, 2]
    job.save(narrow, tmp_path / "model", plan=plan)
    loaded = job.load(tmp_path / "model", network=Labelled())
    torch.testing.assert_close(loaded(*example), narrow.eval()(*example))


class Updated(nn.Module):
    """A constant kernel in an attribute, as in partial convolutions (Liu et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.ones = torch.ones(1, 1, 3, 3)
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        update = nn.functional.conv2d(mask, self.ones, padding=1)
        return self.two(self.one(images) * update)


def test_multiply_adds_of_a_constant_kernel_are_counted() -> None:
    example = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    _, plan = job.slim(Updated(), example, target="width=0.5", policy="uniform", importance="l2")
    both = plan.before, plan.after
    assert [cost.macs for cost in both if cost] == [64 * (c * 27 + c * 4 + 9) for c in (16, 8)]
