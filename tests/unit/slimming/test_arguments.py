"""What ``job.slim`` says of wrong arguments, and what it takes by default."""

from __future__ import annotations

import copy
import itertools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import job
from job.errors import UsageError
from support.cuts import randomise
from support.networks import Residual

EXAMPLE = torch.rand(1, 3, 24, 24)
BATCH = torch.rand(4, 3, 24, 24)
LABELS = torch.arange(4) % 5


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Residual())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.5}, "target must be 'METRIC=VALUE', e.g. 'macs=0.5'; got 0.5"),
        ({"target": {"params": 0.3}}, "e.g. 'params=0.3'; got {'params': 0.3}"),
        ({"target": "mac=0.5"}, "target: 'mac=0.5' is not a target"),
        ({"target": None}, "target must be 'METRIC=VALUE'"),
        ({"target": "macs=0.001"}, "^target macs=0.001 cannot be reached.*; lower min_keep"),
        ({"example": (1, 3, 24, 24)}, "e.g. torch.rand(1, 3, 24, 24); got (1, 3, 24, 24)"),
        ({"example": {"size": 24}}, "example must be a batch .*; got {'size': 24}"),
        ({"example": "cat.jpg"}, "example must be a batch .*; got 'cat.jpg'"),
        ({"example": torch.rand(0, 3, 24, 24)}, "example is empty: give one sample"),
        ({"example": torch.rand(3, 24, 24)}, "; for a single image give example[None], a batch of"),
        ({"example": torch.rand(1, 4, 8, 8)}, "example: the network does not run on images of 4 x"),
        ({"policy": "globl"}, "policy must be one of uniform, global; got 'globl'; did you m"),
        ({"importance": "gama"}, "importance must be one of .* got 'gama'; did you mean gamma?"),
        ({"compensate": True}, "compensate must be one of none, beta, mean, regress; got True"),
        ({"round_to": 2.0}, "round_to must be a whole number of at least 1; got 2.0"),
        ({"min_keep": 1.5}, "min_keep must be a number from 0 to 1; got 1.5"),
        ({"recalibrate": -1}, "recalibrate must be a whole number of at least 0; got -1"),
        ({"recalibrate": 2}, "recalibrate needs calibration batches"),
        ({"recover": 2}, "recover needs calibration batches"),
        ({"importance": "refit"}, "^importance refit: calibration "),
        ({"ignore": ["two.3"]}, "ignore: the network has no layer 'two.3'; did you mean two."),
        ({"ignore": [nn.ReLU()]}, "ignore: a ReLU that is not part of the network"),
        ({"ignore": [nn.Linear]}, "ignore must be names of layers, or modules; got "),
        ({"ignore": 3}, "ignore must be layers, by name or as modules; got 3"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(
    network: nn.Module, arguments: dict[str, Any], message: str
) -> None:
    pattern = message if re.search(r"\.\*|\^", message) else re.escape(message)
    with pytest.raises(UsageError, match=pattern) as caught:
        job.slim(network, **{"example": EXAMPLE} | arguments)
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (BATCH, "is an iterable of batches, e.g. .*; got one tensor of (4, 3, 24, 24)"),
        ({"images": BATCH}, "is an iterable of batches, .*; got a dict"),
        ([], "it is empty"), ([BATCH[:0]], "it is empty"), (3, "; got 3"),
        ([BATCH, (BATCH * 255).byte()], "batch 1 is uint8, the network takes floating-point"),
        ([BATCH.permute(0, 2, 3, 1)], "batch 0 is (4, 24, 24, 3), the example (1, 3, 24, 24)"),
        ((BATCH, LABELS), "batch 1 is (4,), the example"),
        ([(BATCH[0], 3)], "batch 0 is (3, 24, 24), the example"),
        ([BATCH.numpy()], "batch 0 is a ndarray"),
        ([{"left": BATCH, "right": BATCH}], "is a dict of left, right, of which 2 entries"),
    ],
)  # fmt: skip
def test_a_wrong_calibration_is_named(network: nn.Module, calibration: Any, message: str) -> None:
    pattern = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(UsageError, match=pattern):
        job.slim(network, EXAMPLE, calibration=calibration)


@pytest.mark.parametrize(
    "calibration",
    [
        [BATCH, BATCH[:0]], [(BATCH, LABELS)], [[BATCH.double(), LABELS]], [(BATCH,), {"x": BATCH}],
        [{"pixel_values": BATCH, "labels": LABELS}], iter([BATCH]),
        [(BATCH, LABELS, ["a.jpg"] * 4)],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(BATCH, LABELS), 3),
        [torch.rand(2, 3, 32, 24)], [BATCH.bfloat16()],
    ],
)  # fmt: skip
def test_batches_are_taken_as_people_have_them(network: nn.Module, calibration: Any) -> None:
    narrow, plan = job.slim(network, EXAMPLE, target="macs=0.5", calibration=calibration)
    assert plan.method == "importance refit, compensation regress, allocation outputs"
    assert narrow(EXAMPLE).isfinite().all()


def test_no_more_batches_are_taken_than_are_measured(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.slimming.calibration.user_batches.image_limit", lambda size: size)
    endless, taken = itertools.repeat([BATCH, LABELS]), []
    watched = (taken.append(batch) or batch for batch in endless)
    job.slim(network, EXAMPLE, calibration=watched)
    assert len(taken) == 24 // 4
    job.slim(network, EXAMPLE, calibration=watched, recalibrate=9)
    assert len(taken) == 24 // 4 + 9
    job.slim(network, EXAMPLE, calibration=watched, calibration_images=13)
    assert len(taken) == 24 // 4 + 9 + 4


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({}, ("gamma", "none")), ({"calibration": [BATCH]}, ("refit", "regress")),
        ({"calibration": [BATCH], "compensate": "mean"}, ("gamma", "mean")),
        ({"calibration": [BATCH], "importance": "l2"}, ("l2", "regress")),
        ({"compensate": "beta"}, ("gamma", "beta")), ({"importance": "l2"}, ("l2", "none")),
    ],
)  # fmt: skip
def test_the_best_that_there_is_is_the_default_and_one_line_says_which(
    network: nn.Module, given: dict[str, Any], method: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO, "gammaslim"):
        _, plan = job.slim(network, EXAMPLE, **given)
    outputs = ", allocation outputs" if method[1] == "regress" else ""
    assert plan.method == "importance {}, compensation {}".format(*method) + outputs
    (line,) = caplog.messages
    assert line.startswith(plan.method)
    assert ("no calibration images" in line) == ("calibration" not in given)
    caplog.clear()
    with caplog.at_level(logging.INFO, "gammaslim"):
        job.slim(network, EXAMPLE, importance="gamma", compensate="none")
    assert caplog.messages == []


def test_the_line_is_seen_where_nobody_configured_logging(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("gammaslim"), "hasHandlers", lambda: False)
    job.slim(network, EXAMPLE)
    seen = capsys.readouterr()
    assert seen.err.startswith("gammaslim: importance gamma, compensation none: ")
    assert seen.err.count("\n") == 1
    assert not seen.out


def test_where_nothing_can_be_cut_it_is_said_why() -> None:
    norm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Softmax(1), nn.Conv2d(8, 4, 3))
    with pytest.raises(UsageError, match=r"the main reason \(0\): softmax across channels"):
        job.slim(norm, EXAMPLE)


def test_where_all_channels_are_outputs_it_is_said_how_to_take_fewer() -> None:
    class AllMaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            maps = [self.first(x)]
            return [*maps, self.last(maps[-1])]

    network = AllMaps().eval()
    with pytest.raises(UsageError, match=r"all of them are the network's output\. .* forward="):
        job.slim(network, EXAMPLE)
    _, plan = job.slim(network, EXAMPLE, forward=lambda model, x: model(x)[-1])
    assert plan.layers.keys() == {"first", "last"}
    with pytest.raises(UsageError, match="it has no layers with channels"):
        job.slim(nn.ReLU(), EXAMPLE)


class Spare(nn.Module):
    """A BatchNorm that no pass uses, whose channels count."""

    def __init__(self, spare: int = 64) -> None:
        super().__init__()
        self.one, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.spare = nn.BatchNorm2d(spare)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.one(x)).relu())


def test_a_target_out_of_reach_names_what_is_not_cut() -> None:
    with pytest.raises(UsageError, match=r"the main reason \(spare\): no pass .* uses it") as found:
        job.slim(Spare(), EXAMPLE, target="channels=0.5", min_keep=0)
    assert "min_keep" not in str(found.value)
    with pytest.raises(UsageError, match=r"lower min_keep or round_to") as found:
        job.slim(Spare(2), EXAMPLE, target="channels=0.3", min_keep=0.9)
    assert "the main reason" not in str(found.value)


def test_a_network_without_counted_channels_needs_another_target() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [[nn.Linear(6, 32), nn.Linear(32, 4)]]
            self.own = nn.ParameterList(p for layer in self.layers[0] for p in layer.parameters())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, other = self.layers[0]
            return other(one(x).relu())

    with pytest.raises(UsageError, match=r"no layers whose channels are counted; .*ModuleList"):
        job.slim(Listed(), torch.rand(2, 6), target="channels=0.5", importance="l2")


def test_outputs_that_require_gradients_are_compared() -> None:
    class Siren(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.last = nn.Linear(2, 16), nn.Linear(16, 1)

        def forward(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            places = places.clone().detach().requires_grad_(True)
            return self.last(self.one(places).sin()), places

    narrow, _ = job.slim(Siren(), torch.rand(2, 2), target="channels=0.6", importance="l2")
    assert narrow.one.out_features < 16


def test_gradients_that_the_code_computes_are_compared() -> None:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.last = nn.Linear(3, 16), nn.Linear(16, 1)

        def forward(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                places = places.detach().requires_grad_(True)
                energy = self.last(self.one(places).sin()).sum()
                return energy, -torch.autograd.grad(energy, places)[0]

    narrow, plan = job.slim(Forces(), torch.rand(2, 3), target="channels=0.6", importance="l2")
    assert narrow.one.out_features < 16
    assert plan.proof.error <= 1e-12


def test_layers_to_ignore_are_names_or_modules() -> None:
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())

    network = randomise(nn.Sequential(block(3, 8), block(8, 8), block(8, 8)))
    first = network.get_submodule("0")
    for ignore in (["0"], "0", first, [first], iter([first]), ["0.0.weight"]):
        _, plan = job.slim(network, EXAMPLE, target="channels=0.9", ignore=ignore)
        assert plan.layers.keys() == {"1.0", "1.1", "2.0"}


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "scripted": (torch.jit.script, "TorchScript module .*: pass the nn.Module"),
    "traced": (lambda n: torch.jit.trace(n, EXAMPLE), "TorchScript module .*: pass the nn.Module"),
    "partly scripted": (
        lambda n: nn.Sequential(torch.jit.script(n)), r"has a TorchScript part \(0\).*pass the nn.M"
    ),
    "exported": (lambda n: torch.export.export(n, (EXAMPLE,)), "torch.export: pass the nn.Module"),
    "its module": (
        lambda n: torch.export.export(n, (EXAMPLE,)).module(), "torch.export: pass the nn.Module"
    ),
    "compiled": (torch.compile, "wrapped in OptimizedModule: pass model._orig_mod"),
    "parallel": (nn.DataParallel, "wrapped in DataParallel: pass model.module"),
    "weights": (lambda n: n.state_dict(), "must be a torch.nn.Module, e.g. build it and call load"),
    "a path": (lambda _: "model.pt", "must be a torch.nn.Module; got 'model.pt'"),
    "a class": (type, "must be a torch.nn.Module; got "),
    "lazy": (lambda _: nn.Sequential(nn.LazyConv2d(4, 1)), "no weights yet .*run it once first"),
    "eight bits": (
        lambda n: torch.ao.quantization.quantize_dynamic(n, {nn.Linear}), "quantised.*: pass the fl"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_network_is_refused_with_what_to_pass(network: nn.Module, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UsageError, match=f"^model .*{message}") as caught:
        job.slim(make(copy.deepcopy(network)), EXAMPLE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [Residual, torchvision.models.densenet121])
def test_a_plan_prints_as_a_table(make: Callable[[], nn.Module]) -> None:
    _, plan = job.slim(randomise(make()), torch.rand(1, 3, 64, 64), target="macs=0.5")
    lines = str(plan).splitlines()
    assert 10 < len(lines) <= 40
    assert max(map(len, lines)) < 140
    assert repr(plan) == lines[0]
    assert f"{plan.before.macs:,} -> {plan.after.macs:,} MACs" in lines[0]
    (macs,) = (line.split() for line in lines if line.startswith("macs"))
    assert macs[1:3] == [f"{plan.before.macs:,}", f"{plan.after.macs:,}"]
    first = next(name for name in plan.layers if name in plan.sizes and plan.layers[name].out)
    (row,) = (line for line in lines if line.startswith(first))
    assert row.endswith(f"{plan.sizes[first][1]:,} -> {len(plan.layers[first].out):,}")
    assert ("more layers" in str(plan)) == (len(plan.sizes) > 24)
    assert "the network's output" in lines[-1] + lines[-2]


def test_a_network_that_takes_one_sample_alone_is_told_so(network: nn.Module) -> None:
    def first(module: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.expand(1, *outputs.shape[1:])

    network.register_forward_hook(first)
    message = "the network does not run on a batch of two images of 3 x 24 x 24: "
    with pytest.raises(UsageError, match=message):
        job.slim(network, EXAMPLE)
    assert len(network(EXAMPLE)) == 1


def test_a_cut_in_inference_mode_is_refused(network: nn.Module) -> None:
    with torch.inference_mode(), pytest.raises(UsageError, match="call it outside"):
        job.slim(network, EXAMPLE, target="macs=0.5")
