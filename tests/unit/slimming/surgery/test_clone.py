"""Networks that keep state, functions or things that cannot be copied in places of their own."""

from __future__ import annotations

import argparse
import threading
import weakref
from collections import UserDict, deque
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.errors import UsageError
from support.cuts import randomise
from support.networks import Net, block

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = torch.rand(1, 3, 16, 16)
BATCHES = [torch.rand(4, 3, 16, 16) for _ in range(2)]


class Slot:
    __slots__ = ("table",)

    def __init__(self) -> None:
        self.table: torch.Tensor | None = None


class Keeping(Net):
    """Keeps a table that is made in the first pass."""

    def build(self) -> None:
        self.place: Any = Slot()

    @property
    def kept(self) -> Any:
        return self.place.table

    def keep(self, table: torch.Tensor) -> None:
        self.place.table = table

    def body(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.keep(torch.linspace(0, 1, x.shape[-1], device=x.device, dtype=x.dtype))
        return x + self.kept


class InOptions(Keeping):
    def build(self) -> None:
        self.place = argparse.Namespace(table=None)


class InUserDict(Keeping):
    def build(self) -> None:
        self.place = UserDict()

    @property
    def kept(self) -> Any:
        return self.place.get("table")

    def keep(self, table: torch.Tensor) -> None:
        self.place["table"] = table


class InWeakDict(InUserDict):
    def build(self) -> None:
        self.place: Any = weakref.WeakKeyDictionary()

    @property
    def kept(self) -> Any:
        return self.place.get(self)

    def keep(self, table: torch.Tensor) -> None:
        self.place[self] = table


@pytest.mark.parametrize("kind", [Keeping, InOptions, InUserDict, InWeakDict])
def test_a_table_is_left_unmade_wherever_it_is_kept(kind: type[Keeping], tmp_path: Path) -> None:
    network = randomise(kind())
    narrow, plan = job.slim(network, IMAGE, calibration=BATCHES)
    assert network.kept is None
    expected = narrow.eval()(IMAGE)
    job.save(narrow, tmp_path / "slim", plan=plan)  # with a table that is on the CPU now
    assert torch.equal(job.load(tmp_path / "slim", network=network)(IMAGE), expected)


class Normed(Net):
    """Its passes change weights, and a generator of its own."""

    def build(self) -> None:
        self.c, self.chance = nn.Conv2d(12, 12, 1), np.random.default_rng(0)
        self.d = block(12, 12)
        self.weights = dict.fromkeys(self.c.parameters(), 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.c.weight.data = torch.renorm(self.c.weight.data, p=2, dim=0, maxnorm=0.1)
        self.chance.random()
        y: torch.Tensor = self.d(self.c(x))
        return y


class Resized(Net):
    """Its passes change the size of a buffer."""

    def build(self) -> None:
        self.chance = np.random.default_rng(0)
        self.register_buffer("grid", torch.zeros(0), persistent=False)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.grid) != x.shape[-1]:
            self.grid.resize_(x.shape[-1]).fill_(0.5)
        return x + self.grid


class Replaced(Resized):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.grid) != x.shape[-1]:
            self.grid.data = torch.linspace(0, 1, x.shape[-1], device=x.device)
        return x + self.grid


@pytest.mark.parametrize("kind", [Normed, Resized, Replaced])
def test_what_passes_change_of_tensors_and_chance_is_put_back(kind: type[Any]) -> None:
    network = randomise(kind())
    before = [t.clone() for t in (*network.parameters(), *network.buffers())]
    state, places = network.chance.bit_generator.state, [t.data_ptr() for t in network.parameters()]
    job.slim(network, IMAGE, target="channels=0.8", calibration=BATCHES)
    after = [*network.parameters(), *network.buffers()]
    assert all(map(torch.equal, after, before))
    assert network.chance.bit_generator.state == state
    assert [t.data_ptr() for t in network.parameters()] == places


class Uncuttable(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return x.sort(1).values


def test_with_images_too_it_is_said_why_nothing_can_be_cut() -> None:
    with pytest.raises(UsageError, match="sort across channels is not supported"):
        job.slim(Uncuttable(), IMAGE, calibration=BATCHES)


class Helper:
    def __init__(self, run: Any) -> None:
        self.run = run


class Referring(Net):
    """Reads a layer by way of an object's function."""

    def build(self) -> None:
        self.c = block(12, 12)
        self.way: Any = Helper(lambda x: self.c(x))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.way.run(x)
        return y


class ByDeque(Referring):
    def build(self) -> None:
        self.c = block(12, 12)
        self.way: Any = deque([lambda x: self.c(x)])

    def body(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.way[0](x)
        return y


class ByWeakReference(Referring):
    def build(self) -> None:
        self.c = block(12, 12)
        self.way: Any = weakref.ref(self)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.way().c(x)
        return y


class Slotted(nn.Module):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class BySlots(Referring):
    def build(self) -> None:
        self.c = nn.Sequential(block(12, 12), Slotted())

    def body(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c(x)
        return y


class ByHandle(Referring):
    """Keeps the handle of a hook."""

    def build(self) -> None:
        self.c, self.seen = block(12, 12), {}
        self.way: Any = [self.c.register_forward_hook(self.see)]

    def see(self, layer: nn.Module, inputs: Any, result: torch.Tensor) -> None:
        self.seen["c"] = result

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.c(x)
        return F.relu(self.seen["c"])


@pytest.mark.parametrize("kind", [Referring, ByDeque, ByWeakReference, BySlots, ByHandle])
def test_what_refers_to_the_network_refers_to_the_narrow_one(kind: type[nn.Module]) -> None:
    network = randomise(kind())
    narrow, plan = job.slim(network, IMAGE, target="channels=0.5")
    assert any(name.startswith("c.") for name in plan.layers)
    expected = narrow(IMAGE)
    for parameter in network.parameters():
        parameter.data.zero_()
    assert torch.equal(narrow(IMAGE), expected)


class Locked(Net):
    """Only one pass at a time."""

    def build(self) -> None:
        self.lock, self.c = threading.Lock(), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            y: torch.Tensor = self.c(x)
            return y


def test_a_network_with_a_lock_is_calibrated() -> None:
    narrow, plan = job.slim(randomise(Locked()), IMAGE, calibration=[*BATCHES, IMAGE[..., 1:]])
    assert "c.0" in plan.layers
    assert narrow(IMAGE) is not None


class Recalling(Net):
    """Reads what it has put into an attribute before another layer ran."""

    def build(self) -> None:
        self.c, self.d = block(12, 12), block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        y: torch.Tensor = self.d(self.c(x) + self.seen)
        return y


class Passing(Recalling):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.d(self.c(x) + x)
        return y


@pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 18, 20)])
def test_batches_do_not_see_what_is_kept_of_each_other(sizes: tuple[int, ...]) -> None:
    wide = randomise(Passing())
    keeping = Recalling()
    keeping.load_state_dict(wide.state_dict())
    batches = [torch.randn(4 + n, 3, size, 16) * (1 + n) for n, size in enumerate(sizes)]
    expected, found = (
        job.slim(network, IMAGE, calibration=batches)[0].state_dict() for network in (wide, keeping)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


class Generating(Net):
    def build(self) -> None:
        self.numbers = (number for number in range(100))


def test_what_cannot_be_copied_is_named() -> None:
    with pytest.raises(UsageError, match=r"Generating\.numbers: cannot pickle 'generator'"):
        job.slim(Generating(), IMAGE)


def test_a_forward_function_that_reaches_the_network_by_a_global_name_is_refused() -> None:
    network = Keeping()
    names = {"before": network.stem[0].forward}
    network.stem[0].forward = eval("lambda x: before(x)", names)
    with pytest.raises(
        UsageError, match=r"of stem\.0 uses the global name 'before'.*before=before"
    ):
        job.slim(network, IMAGE)
    network.stem[0].forward = eval("lambda x, before=before: before(x)", names)
    narrow, _ = job.slim(network, IMAGE)
    assert narrow(IMAGE).isfinite().all()
