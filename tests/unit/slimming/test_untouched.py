"""A network that is analysed, cut or measured is exactly as it was, and so is chance."""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.errors import GammaslimError
from job.slimming.compensation.recalibration import recalibrate_batchnorms
from support.cuts import randomise
from support.networks import CUTTABLE, LEFT_ALONE, Net, PreActivation, block

IMAGE = torch.rand(1, 3, 20, 28)
BATCHES = [(torch.rand(4, 3, 20, 28), torch.arange(4) % 5) for _ in range(2)]
TABLES: dict[int, torch.Tensor] = {}
LAST: list[Any] = [None]
CALLS = 0


class Table(Net):
    """A table that is made in the first pass."""

    def build(self) -> None:
        self.c, self.table = block(12, 12), None

    def body(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or self.table.shape[-1] != x.shape[-1]:
            self.table = torch.linspace(0, 1, x.shape[-1], device=x.device, dtype=x.dtype)
        return self.c(x) + self.table


class Registered(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        if "table" not in self._buffers:
            self.register_buffer("table", torch.linspace(0, 1, x.shape[-1], device=x.device))
        return x + self.table


class Keeping(Net):
    """Keeps activations, in an attribute, in a nested list, by a hook."""

    def build(self) -> None:
        self.c, self.kept, self.seen = block(12, 12), {"last": [], "shapes": set()}, []
        self.c.register_forward_hook(lambda module, inputs, result: self.seen.append(result))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.features = self.c(x)
        self.kept["last"].append(x)
        self.kept["shapes"].add(tuple(x.shape))
        return self.features


class Counting(Net):
    """Counts in a buffer, in an attribute, in the class and in its module, and draws numbers."""

    passes = 0

    def build(self) -> None:
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.moving, self.number = torch.zeros(4), 0
        self.numpy, self.chance = np.zeros(3), torch.Generator().manual_seed(3)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        global CALLS
        CALLS += 1
        Counting.passes += 1
        self.count += 1
        self.moving.mul_(0.9).add_(1)
        self.numpy += 1
        self.number += 1
        torch.rand(2, generator=self.chance)
        torch.rand(1), random.random(), np.random.rand()
        return x


@functools.lru_cache
def grid(size: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(0, 1, size, device=device)


class Globally(Net):
    """Caches outside of itself."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        if width not in TABLES:
            TABLES[width] = torch.linspace(0, 1, width, device=x.device)
        LAST[0] = x
        return x + TABLES[width]


class Memoising(Net):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return x + grid(x.shape[-1], x.device)


class Closing(Net):
    """A closure over itself, and another that remembers."""

    def build(self) -> None:
        self.c, seen, last = block(12, 12), [], None
        self.path = lambda x: self.c(x)
        before = self.stem.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            nonlocal last
            seen.append(x)
            last = x
            return before(x)

        self.stem.forward = forward
        self.partial = functools.partial(F.leaky_relu, negative_slope=0.1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.partial(self.path(x))


class Hooking(Net):
    """Changes itself: hooks, modes, modules, requires_grad of none."""

    def build(self) -> None:
        self.c = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.c.register_forward_hook(lambda *_: None)
        self.c.train(not self.c.training)
        self.c.eval()
        self.added = nn.Identity()
        return self.c(x)


class Failing(Counting):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        super().body(x)
        self.half = x
        raise ValueError("no such thing")


KEEPING = [Table, Registered, Keeping, Counting, Globally, Closing, Hooking]


def state(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """All that a network holds, as values that can be compared."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        version = value._version if isinstance(value, nn.Parameter) else None
        return id(value), value.detach().clone().tolist(), value.requires_grad, version
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if id(value) in seen:
        return "again"
    seen[id(value)] = value
    if isinstance(value, nn.Module):
        return type(value), state(vars(value), seen)
    if isinstance(value, dict):
        return id(value), [(key, state(part, seen)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [state(part, seen) for part in value]
    cells = getattr(value, "__closure__", None)
    if cells:
        return id(value), [state(cell.cell_contents, seen) for cell in cells]
    return value if isinstance(value, (set, int, float, str, type(None))) else id(value)


def everything(network: nn.Module) -> Any:
    outside = CALLS, Counting.passes, list(TABLES), LAST[0], grid.cache_info().currsize
    chance = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return state(network), outside, chance


@pytest.mark.parametrize("kind", [*KEEPING, Memoising, *CUTTABLE, *LEFT_ALONE])
@pytest.mark.sampled(9)
def test_a_cut_leaves_no_trace(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    network = randomise(kind()).train()
    image = torch.rand(1, 3, 33, 27) if kind.__name__ == "Flattened" else IMAGE
    before = everything(network)
    narrow, plan = job.slim(network, image, importance="l2", target="params=0.9")
    assert everything(network) == before
    assert plan.after.params < plan.before.params
    with torch.no_grad():
        assert narrow.eval()(image) is not None
        network.eval()(image)


@pytest.mark.parametrize("kind", KEEPING)
def test_nor_does_what_runs_calibration_images(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    network = randomise(kind())
    network(IMAGE)  # whatever it keeps of a pass is there
    before = everything(network)
    for importance, compensate in (("refit", "regress"), ("taylor", "mean"), ("gamma", "beta")):
        job.slim(
            network, IMAGE, importance=importance, compensate=compensate, calibration=BATCHES,
            recalibrate=1, target="params=0.9",
        )  # fmt: skip
        assert everything(network) == before
    norms = {name for name, _ in network.named_buffers() if "running" in name}
    kept = {n: b.clone() for n, b in network.named_buffers() if n not in norms}
    recalibrate_batchnorms(network, BATCHES)
    assert all(torch.equal(b, kept[n]) for n, b in network.named_buffers() if n in kept)


def test_nor_does_an_error() -> None:
    network = randomise(Failing())
    before = everything(network)
    with pytest.raises(GammaslimError, match="no such thing"):
        job.slim(network, IMAGE)
    assert everything(network) == before


def test_what_closes_over_the_network_closes_over_the_narrow_one() -> None:
    torch.manual_seed(1)
    network = randomise(Closing())
    narrow, plan = job.slim(network, IMAGE, target="channels=0.5")
    assert {"stem.0", "c.0"} <= set(plan.layers)
    expected = narrow(IMAGE)
    for parameter in network.parameters():
        parameter.data.zero_()
    assert torch.equal(narrow(IMAGE), expected)  # of nothing of the wide one


def test_closures_are_copied_after_a_compilation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # as torch.compile leaves the class behind
    monkeypatch.setattr(nn.Module, "__setstate__", lambda self, state: vars(self).update(state))
    test_what_closes_over_the_network_closes_over_the_narrow_one()


class TwoNames(PreActivation):
    """Layers that are attributes, stand in a Sequential and in a list."""

    def build(self) -> None:
        super().build()
        self.path = nn.Sequential(self.n1, nn.ReLU(), self.c1)
        self.more = [self.n2, nn.ReLU(), self.c2]
        self.call = self.n3.forward

    def body(self, x: torch.Tensor) -> torch.Tensor:
        y = self.path(x)
        for layer in self.more:
            y = layer(y)
        x = x + y
        return x + self.c3(F.leaky_relu(self.n3(x)))


def test_one_layer_by_two_names_is_cut_once() -> None:
    torch.manual_seed(0)
    network = randomise(TwoNames())
    narrow, plan = job.slim(network, IMAGE, target="channels=0.4", min_keep=0)
    assert plan.layers["n1"].select is not None
    assert narrow.path[0] is narrow.n1
    assert narrow.more[0] is narrow.n2
    again, _ = job.slim(narrow, IMAGE, target="channels=0.9", min_keep=0)
    assert again.path[0] is again.n1


class Tied(Net):
    """Convolutions that share a weight, not a bias; BatchNorms that share γ and β alone."""

    def build(self) -> None:
        self.c1, self.c2 = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.b1, self.b2 = nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.tie()

    def tie(self) -> None:
        self.c2.weight, self.b2.weight, self.b2.bias = self.c1.weight, self.b1.weight, self.b1.bias

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))))


class OtherBias(Tied):
    """One layer's weight with another's bias."""

    def tie(self) -> None:
        self.bias = nn.Parameter(torch.rand(12))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.c1.weight, self.bias, padding=1)
        return F.relu(self.b2(self.c2(x)))


@pytest.mark.parametrize(
    ("kind", "compensate"), [(Tied, "none"), (Tied, "regress"), (OtherBias, "none")]
)
def test_shared_tensors_are_cut_in_every_layer(kind: type[Net], compensate: str) -> None:
    torch.manual_seed(0)
    network = randomise(kind())
    narrow, plan = job.slim(
        network,
        IMAGE,
        target="params=0.4",
        importance="l2",
        compensate=compensate,
        calibration=BATCHES,
    )
    width = len(narrow.b1.weight if kind is Tied else narrow.bias)
    assert width < 12
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    assert narrow.c1.out_channels == width
    if kind is Tied:
        assert narrow.c2.out_channels == narrow.b2.num_features == width
        assert narrow.c1.weight is narrow.c2.weight
        assert narrow.b1.weight is narrow.b2.weight


class ReadElsewhere(Net):
    """A weight that something else reads too; a bias that is computed."""

    def build(self) -> None:
        self.c, self.d, self.e = block(12, 12), block(12, 12), nn.Conv2d(12, 12, 1)
        self.f = block(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.d(self.c(x))
        y = F.conv2d(x, self.c[0].weight.flip(0), padding=1)
        return self.f(y + F.conv2d(x, self.e.weight, self.e.bias * 2))


def test_a_weight_that_is_read_elsewhere_is_left_alone() -> None:
    narrow, plan = job.slim(randomise(ReadElsewhere()), IMAGE, target="params=0.99")
    assert "c.0" not in plan.layers or plan.layers["c.0"].out is None
    assert any("conv2d uses its weight too" in blocked.reason for blocked in plan.blocked)
    assert narrow.e.bias.shape == (12,)


def test_copies_of_copies_are_whole() -> None:
    narrow, _ = job.slim(randomise(Closing()), IMAGE)
    assert copy.deepcopy(narrow)(IMAGE).shape == (1, 5)


class Instances(OrderedDict):
    """Makes an object of each class that it holds when it is asked for it, as a table of ops."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)()

    def __setitem__(self, name: str, kind: type) -> None:
        super().__setitem__(name, kind if isinstance(kind, type) else None)


class Backwards(list):
    """A list that is iterated from its end."""

    def __iter__(self) -> Any:
        return reversed(list(super().__iter__()))


OPS, KEPT, USES = Instances(relu=nn.ReLU, silu=nn.SiLU), Backwards([1, 2, 3]), deque([0], maxlen=1)


class FromTables(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), OPS["relu"], nn.Conv2d(8, 4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        OPS["gelu"] = nn.GELU
        KEPT.append(len(KEPT))
        USES.append(USES[0] + 1)
        return super().forward(x)


def test_containers_with_methods_of_their_own_keep_their_items() -> None:
    job.slim(FromTables().eval(), IMAGE, target="params=0.9", importance="l2")
    assert list(OPS.items()) == [("relu", nn.ReLU), ("silu", nn.SiLU)]
    assert list.copy(KEPT) == [1, 2, 3]
    assert list(USES) == [0]
    assert isinstance(OPS["silu"], nn.SiLU)


class Drawing(nn.Module):
    """A layer whose copy is built anew, with random weights at first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def __deepcopy__(self, memo: dict[int, object]) -> Drawing:
        copied = memo[id(self)] = Drawing()
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_copies_that_draw_random_numbers_leave_the_generator_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), Drawing(), nn.Conv2d(8, 4, 1))
    image, chance = torch.rand(1, 3, 12, 12), torch.get_rng_state()
    narrow, _ = job.slim(
        network, image, policy="uniform", target="width=0.5", importance="l2", ignore=["2"]
    )
    assert torch.equal(torch.get_rng_state(), chance)
    assert narrow[0].out_channels == 3
    torch.testing.assert_close(narrow[2].conv.weight, network[2].conv.weight)
