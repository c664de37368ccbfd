"""``save`` and ``load``: what comes back is what went in, with and without what builds it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from click.testing import CliRunner
from torch import nn

import job
from job.cli.main import gammaslim
from job.errors import DataError, InputNotFound, OutputError, UsageError
from job.models.student import StudentNet
from support.cuts import randomise
from support.networks import BareStream, Residual

IMAGE = torch.rand(1, 3, 32, 32)
PROBE = torch.rand(3, 3, 32, 32)


def slimmed(wide: nn.Module) -> tuple[nn.Module, job.Plan]:
    return job.slim(randomise(wide), IMAGE, target="macs=0.5", importance="l2", compensate="beta")


def tiny(width: int = 8, classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
        nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "given", "name"),
    [
        (lambda: torchvision.models.squeezenet1_1(num_classes=7), {}, "squeezenet1_1"),
        (Residual, {}, "support.networks:Residual"),
        (lambda: StudentNet(base=4), {"model": StudentNet, "model_args": {"base": 4}}, "student"),
        (lambda: tiny(12), {"model": tiny, "model_args": {"width": 12}}, f"{__name__}:tiny"),
        (lambda: tiny(), {"model": f"{__name__}:tiny"}, f"{__name__}:tiny"),
    ],
)
def test_what_builds_a_network_is_found_or_given(
    make: Callable[[], nn.Module], given: dict[str, object], name: str, tmp_path: Path
) -> None:
    narrow, plan = slimmed(make())
    job.save(narrow, tmp_path / "slim", plan=plan, **given)
    assert {file.name for file in (tmp_path / "slim").iterdir()} == {
        "model.json", "model.safetensors"
    }  # fmt: skip
    card = json.loads((tmp_path / "slim" / "model.json").read_text())
    assert (card["model"], card["args"]) == (name, given.get("model_args", {}))
    assert card["num_classes"] == narrow(PROBE).shape[1]
    again = job.load(tmp_path / "slim")
    assert type(again) is type(narrow)
    assert not again.training
    assert torch.equal(again(PROBE), narrow.eval()(PROBE))


class Shared(nn.Module):
    """Takes two inputs, and what it needs to be built; one weight has two names."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.again = body, nn.Linear(3, 3), nn.Linear(3, 3)
        self.again.weight = self.head.weight

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(left)) + self.again(self.body(right))


def test_any_network_loads_into_the_one_before_the_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = randomise(Shared(tiny()))
    narrow, plan = job.slim(wide, (IMAGE, IMAGE), policy="uniform", target="width=0.5")
    with caplog.at_level(logging.INFO, "gammaslim"):
        job.save(narrow, str(tmp_path / "slim"), plan=plan)
    assert "load it with load(path, network=" in caplog.text
    with pytest.raises(UsageError, match=r"load it in Python with load\(path, network="):
        job.load(tmp_path / "slim")
    done = CliRunner().invoke(gammaslim, ["inspect", str(tmp_path / "slim")])
    assert done.exit_code == 2
    fresh = Shared(tiny())
    again = job.load(tmp_path / "slim", network=fresh)
    assert torch.equal(again(PROBE, PROBE), narrow.eval()(PROBE, PROBE))
    assert again.head.weight is again.again.weight
    assert fresh.body[0].weight.shape[0] == 8
    for other in (Shared(tiny(4)), tiny(), Residual()):
        with pytest.raises(DataError):
            job.load(tmp_path / "slim", network=other)


class Signed(nn.Module):
    """One of two networks that have the same weights."""

    def __init__(self, sign: int = 1) -> None:
        super().__init__()
        self.body, self.sign = tiny(), sign

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images) * self.sign


def test_what_builds_another_network_of_the_same_weights_is_not_taken(tmp_path: Path) -> None:
    for sign, name in ((1, f"{__name__}:Signed"), (-1, "")):
        narrow, plan = slimmed(Signed(sign))
        job.save(narrow, tmp_path / str(sign), plan=plan)
        assert json.loads((tmp_path / str(sign) / "model.json").read_text())["model"] == name
    with pytest.raises(UsageError, match="the outputs differ"):
        job.save(narrow, tmp_path / "x", plan=plan, model=Signed)
    job.save(narrow, tmp_path / "y", plan=plan, model=Signed, model_args={"sign": -1})
    assert torch.equal(job.load(tmp_path / "y")(PROBE), narrow.eval()(PROBE))


def test_several_cuts_and_none_are_saved(tmp_path: Path) -> None:
    wide = Residual()
    once, first = slimmed(wide)
    twice, second = job.slim(once, IMAGE, target="channels=0.7")
    job.save(twice, tmp_path / "twice", plan=[first, second])
    assert torch.equal(job.load(tmp_path / "twice")(PROBE), twice.eval()(PROBE))
    job.save(wide, tmp_path / "wide", model=Residual, class_names="abcde", image_size=48)
    card = json.loads((tmp_path / "wide" / "model.json").read_text())
    assert (card["input"]["size"], card["class_names"]) == (48, list("abcde"))
    assert torch.equal(job.load(tmp_path / "wide")(PROBE), wide.eval()(PROBE))
    with pytest.raises(UsageError, match=r": .* is \(.*\), not .*; is the plan missing\?"):
        job.save(twice, tmp_path / "x", model=Residual)


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    narrow, plan = slimmed(BareStream())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for arguments, error, message in (
        ({"path": tmp_path / "full"}, OutputError, "already exists"),
        ({"path": 3}, UsageError, "path must be a folder; got 3"),
        ({"plan": "global"}, UsageError, "plan must be what slim returned"),
        ({"model": 3}, UsageError, "model must be a name, or what builds the network; got 3"),
        ({"model": lambda: BareStream()}, UsageError, "cannot be imported by its name"),
        ({"model": "support.networks:Residual"}, UsageError, "does not give this network"),
        ({"model": "resnet"}, UsageError, "is unknown; did you mean"),
        ({"network": narrow.state_dict()}, UsageError, "model must be a torch.nn.Module"),
    ):
        wanted = {"network": narrow, "path": tmp_path / "slim", "plan": plan} | arguments
        with pytest.raises(error, match=message):
            job.save(**wanted)
    assert not (tmp_path / "slim").exists()
    with pytest.raises(UsageError, match="path must be a folder; got None"):
        job.load(None)
    with pytest.raises(InputNotFound):
        job.load(tmp_path / "slim")
    with pytest.raises(UsageError, match="load_state_dict"):
        job.load(tmp_path / "full" / "notes.txt")


def test_classes_among_the_arguments_are_those_of_the_network(tmp_path: Path) -> None:
    narrow, plan = slimmed(StudentNet(base=4, num_classes=5))
    given = {"model": StudentNet, "model_args": {"base": 4, "num_classes": 5}}
    job.save(narrow, tmp_path / "slim", plan=plan, **given)
    assert torch.equal(job.load(tmp_path / "slim")(PROBE), narrow.eval()(PROBE))
