"""The sensitivity of a network: its numbers are those of a cut, in every form that it is given."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import job
from job.artifacts.json_records import from_json, to_json
from job.errors import UsageError
from job.slimming.analysis import analyse
from job.slimming.cut import measure_importance, measure_losses
from job.slimming.group_sensitivity import TABLE_FRACTIONS, measure_sensitivity
from job.slimming.method import Method
from job.slimming.planning.cost import network_cost
from job.slimming.planning.plan import keep_all, layers_of
from job.slimming.sensitivity.measure import FRACTIONS
from job.slimming.sensitivity.record import GroupSensitivity, LossPoint, Sensitivity
from job.slimming.sensitivity.summary import summarise_losses
from job.slimming.surgery.surgery import apply_plan
from support.cuts import randomise
from support.networks import Dense, Residual

IMAGES = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
METHOD = Method("refit", "regress", allocate="outputs")


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make())


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return made(lambda: torchvision.models.mobilenet_v2(num_classes=6, width_mult=0.25))


@pytest.fixture(scope="module")
def measured(network: nn.Module) -> Sensitivity:
    return job.sensitivity(network, IMAGES[:1], calibration=IMAGES.split(10), target="macs=0.6")


def test_the_losses_are_those_that_a_cut_measures(
    network: nn.Module, measured: Sensitivity
) -> None:
    graph = analyse(network, IMAGES[:1])
    scores, data = measure_importance(network, graph, METHOD, lambda: IMAGES.split(10))
    curves = measure_losses(network, graph, scores, METHOD, data, IMAGES[:1])
    assert (measured.loss, measured.images) == ("kl", 5)  # held out of 24
    assert [row.group for row in measured.rows] == [group.name for group in graph.groups]
    for row, group in zip(measured.rows, graph.groups, strict=True):
        curve = curves[group.name]
        assert [point.fraction for point in row.points] == list(TABLE_FRACTIONS)
        losses = {point.channels: point.loss for point in row.points}
        for count, loss in zip(curve.counts, curve.losses, strict=True):
            assert losses[count] == loss
        assert row.channels == group.size
        assert row.points[0].channels == int(0.9 * group.size)


def test_points_between_those_of_a_cut_change_no_curve(network: nn.Module) -> None:
    graph = analyse(network, IMAGES[:1])
    scores, data = measure_importance(network, graph, METHOD, lambda: IMAGES.split(10))
    parts = network, graph, scores, METHOD, data, IMAGES[:1]
    plain, more = measure_losses(*parts), measure_losses(*parts, more=TABLE_FRACTIONS)
    for name, curve in plain.items():
        assert np.array_equal(curve.by_count, more[name].by_count)
        assert set(curve.counts) < set(more[name].counts) or len(curve.by_count) < 5
        assert (curve.images, curve.kind) == (more[name].images, more[name].kind) == (5, "kl")


def test_what_a_target_keeps_is_what_slim_keeps(network: nn.Module, measured: Sensitivity) -> None:
    _, plan = job.slim(network, IMAGES[:1], calibration=IMAGES.split(10), target="macs=0.6")
    assert measured.target == "macs=0.6"
    assert {row.group: row.kept for row in measured.rows} == {
        name: len(kept) for name, kept in plan.groups.items()
    }
    assert any((row.kept or 0) < row.channels for row in measured.rows)


@pytest.mark.parametrize(
    "make",
    [Residual, Dense, lambda: torchvision.models.mobilenet_v2(num_classes=6, width_mult=0.25)],
)
def test_the_share_of_cost_is_that_of_networks_really_cut(make: Any) -> None:
    """A cost is a polynomial of degree two in a group's channels: three cuts give it at none."""
    wide = made(make)
    graph = analyse(wide, IMAGES[:1])
    whole = network_cost(wide, 32)
    rows = {row.group: row for row in summarise_losses(wide, graph, {}, FRACTIONS).rows}
    for group in graph.groups:
        counts = [1, 2, group.size]
        costs = []
        for count in counts:
            keep = keep_all(graph)
            keep[group.channels[count:]] = False
            costs.append(network_cost(apply_plan(wide, layers_of(graph, keep)), 32))
        for metric in ("macs", "params"):
            left = np.polyfit(counts, [getattr(cost, metric) for cost in costs], 2)[-1]
            saved = 1 - left / getattr(whole, metric)
            assert getattr(rows[group.name], metric) == pytest.approx(saved, abs=1e-6)


class Dense2d(nn.Module):
    """A dense map and a vector, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.head = nn.Conv2d(8, 2, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.norm(self.one(x)))
        return {"map": self.two(x), "vector": self.head(x.mean((2, 3)))}


def test_other_outputs_have_squared_errors_and_the_network_is_not_changed() -> None:
    wide = made(Dense2d).train()
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    state = torch.get_rng_state()
    found = job.sensitivity(wide, IMAGES[:1], calibration=[IMAGES])
    assert torch.equal(state, torch.get_rng_state())
    assert wide.training
    assert all(torch.equal(before[key], value) for key, value in wide.state_dict().items())
    assert (found.loss, found.target) == ("squared_error", None)
    assert "squared error, relative to the squares of the outputs" in str(found)
    (row,) = found.rows
    losses = [point.loss for point in row.points]
    assert losses == sorted(losses)
    assert row.kept is None
    (ignored,) = (job.sensitivity(wide, IMAGES[:1], calibration=[IMAGES], ignore=["one"]),)
    assert ignored.rows == ()
    assert ignored.loss == ""
    assert "no loss was measured" in str(ignored)
    assert any(each.layer == "one" for each in ignored.blocked)


def test_the_table_the_csv_and_the_json_say_the_same(measured: Sensitivity) -> None:
    record = json.loads(json.dumps(measured.to_dict()))
    assert list(record) == ["loss", "images", "fractions", "target", "groups", "blocked"]
    assert list(record["groups"][0]) == ["group", "channels", "macs", "params", "points", "kept"]
    assert list(record["groups"][0]["points"][0]) == ["fraction", "channels", "loss"]
    assert list(record["blocked"][0]) == ["layer", "channels", "reason"]
    assert to_json(measured) == measured.to_dict()
    assert from_json(Sensitivity, record) == measured
    lines = list(csv.DictReader(io.StringIO(measured.to_csv())))
    assert list(lines[0]) == [
        "group", "channels", "macs", "params", "loss_90", "loss_75", "loss_50", "loss_25",
        "loss_0", "kept",
    ]  # fmt: skip
    for line, row in zip(lines, record["groups"], strict=True):
        assert line["group"] == row["group"]
        assert float(line["macs"]) == row["macs"]
        assert float(line["loss_25"]) == row["points"][3]["loss"]
        assert int(line["kept"]) == row["kept"]
    text = str(measured)
    assert text.startswith(
        "loss of the outputs (KL divergence of the softmax, in nats) on 5 images"
    )
    header = next(line for line in text.splitlines() if line.startswith("group"))
    assert header.split("  ")[-1].strip() == "at macs=0.6"
    assert text.rstrip().endswith("the network's output")


def test_a_loss_that_is_unknown_is_empty() -> None:
    row = GroupSensitivity("a", 4, 0.5, 0.25, (LossPoint(0.5, 2, None),))
    found = Sensitivity("kl", 3, (0.5, 0.0), None, (row,))
    assert found.to_csv() == "group,channels,macs,params,loss_50,loss_0\na,4,0.5,0.25,,\n"
    assert str(found).splitlines()[-1].split() == ["a", "4", "50.0%", "25.0%"]
    assert "on 3 images" in str(found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"calibration": None}, "calibration is an iterable of batches"),
        ({"calibration": []}, "it is empty"),
        ({"target": "macs=2%"}, "is not a target"),
        ({"target": "macs=0.001"}, "^target .*cannot be reached"),
        ({"ignore": ["nothing"]}, "ignore: the network has no layer"),
    ],
)
def test_invalid_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        job.sensitivity(made(Residual), IMAGES[:1], **{"calibration": [IMAGES], **arguments})


def test_progress_may_interrupt_the_measurement() -> None:
    wide = made(Residual)
    graph = analyse(wide, IMAGES[:1])

    def stop(step: str, number: int, _count: int) -> None:
        if (step, number) == ("measuring output losses", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(wide, graph, lambda: [IMAGES], IMAGES[:1], progress=stop)
    assert not wide._forward_pre_hooks
