"""The user's own task: the example of the manual, what is said of a wrong one, and its batches."""

from __future__ import annotations

import copy
import errno
import json
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from job.artifacts.json_records import from_json, to_json
from job.artifacts.records import RoundRecord
from job.cli.command_options import EvaluateOptions, ModelOptions, PredictOptions
from job.cli.evaluate import evaluate
from job.cli.predict import predict
from job.config import PruneConfig
from job.data.sample_order import epoch_table
from job.data.task_items import ItemSplit, TaskItems, stack_items, take_samples
from job.distributed.collectives import start
from job.errors import DataError, InputNotFound, StorageError, UsageError
from job.pipeline.prune import prune
from job.pipeline.task_data import task_dataset, task_preprocessing
from job.tasks.loading import input_shape_of, load_task, try_task
from job.training.epoch import EpochResult
from job.training.objective import TaskObjective
from job.training.session import RoundSpec, Unattended
from job.training.task_evaluation import TaskEvaluator
from job.training.trainer import Trainer, TrainingRound
from support.commands import ROOT
from support.shapes import Segmentation, UNet


@pytest.fixture
def manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example of the manual as shapes.py in the current folder."""
    text = (ROOT / "job" / "README.md").read_text("utf-8")
    code = text.partition("<!-- task: begin -->\n```python\n")[2].partition("```")[0]
    (tmp_path / "shapes.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "shapes", raising=False)
    return tmp_path


def example(**more: Any) -> PruneConfig:
    return PruneConfig(
        task="shapes:Shapes", model="shapes:network", policy="global", target="macs=0.5",
        base_epochs=3, rounds=1, epochs=2, lr=0.01, batch_size=16, workers=0, wandb="off",
        device="cpu", **more,
    )  # fmt: skip


def test_the_example_of_the_manual_runs(manual: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(example())
    run = manual / "runs" / "shapes-network-shapes-Shapes"
    summary = json.loads((run / "summary.json").read_text())
    (last,) = summary["rounds"]
    assert last["macs"] <= 0.5 * summary["base"]["macs"]
    assert last["valid_iou"] > summary["base"]["valid_iou"] - 0.01
    assert last["valid_iou"] > 0.8
    capsys.readouterr()
    model = ModelOptions(path=str(run))
    evaluate(model, EvaluateOptions(device="cpu", workers=0), as_json=False)
    shown = capsys.readouterr().out
    assert "validation split of the task shapes:Shapes: 16 items" in shown
    assert f"iou {last['valid_iou']:.4f}" in shown
    with pytest.raises(InputNotFound, match="no testing data; --split can be training, valid"):
        evaluate(model, EvaluateOptions(split="testing", workers=0), as_json=True)
    with pytest.raises(UsageError, match="predict takes models of --task"):
        predict(model, PredictOptions(workers=0), "-")


def test_a_dry_run_tries_the_whole_task(manual: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(example(dry_run=True))
    out = capsys.readouterr().out
    assert "inputs (3, 32, 32)" in out
    assert "dry run: all is well" in out
    assert not (manual / "runs").exists()


class Rows:
    """Inputs (2, 8) and a class; ``broken`` is raised when an item is read."""

    def __init__(self, count: int = 6, broken: Exception | None = None) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.broken:
            raise self.broken
        return torch.full((2, 8), float(index)) + torch.rand(2, 8), index % 3


class Signals:
    """Classes of signals (C, L), with parts replaced by ``changes``."""

    def __init__(self, **changes: Any) -> None:
        self.training, self.validation = Rows(), Rows(4)
        for name, value in changes.items():
            setattr(self, name, value)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        return F.cross_entropy(outputs, targets, reduction="sum"), len(targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        return {"right": ((outputs.argmax(1) == targets).sum(), len(targets))}


def signal_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )


def fails(*_: Any) -> Any:
    raise ValueError("of my own")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": None}, r"returned Signals, which has no loss\(\)"),
        ({"training": [1]}, r"an item must be a pair \(inputs, targets\); got int"),
        ({"training": 3}, "its training must be a data set"),
        ({"validation": Rows(0)}, "its validation has no items"),
        ({"training": Rows(broken=KeyError("x"))}, r"be read: KeyError.*test_tasks.py, line"),
        ({"loss": fails}, r"loss\(\) fails: ValueError: of my own \(test_tasks.py, line"),
        ({"metrics": fails}, r"metrics\(\) fails: ValueError"),
        ({"loss": lambda *_: 1.0}, r"loss\(\) must return a sum, as a tensor, and a count"),
        ({"loss": lambda x, _: (x.detach().sum(), 2)}, r"that loss\(\) returns has no gradient"),
        ({"loss": lambda x, _: (x.sum() * torch.nan, 2)}, r"returns nan for the first 2 training"),
        ({"loss": lambda x, _: (x.sum(), -2)}, r"returns the count -2 for the first 2 training"),
        ({"class_names": "abc"}, "its class_names must be a list of texts; got 'abc'"),
        ({"fingerprint": 3}, "its fingerprint must be a text; got 3"),
        ({"collate": lambda items: ((items[0][0],) * 2, 1)}, "are a tuple; the job trains "),
        ({"metrics": lambda *_: {"a": (torch.nan, 1)}}, "a sum or count of a that is not finite"),
        ({"metrics": lambda *_: {}}, "must return a dict of sums and counts"),
        ({"metrics": lambda *_: {"loss": (1, 1)}}, "a metric is named 'loss'"),
        ({"metrics": lambda *_: {"a b": (1, 1)}}, "a metric is named 'a b'"),
        ({"metrics": lambda *_: {"a": 1}}, "must be a sum and a count"),
        ({"metrics": lambda *_: {"a": (torch.ones(2), 1)}}, "sums and counts of a differ"),
        ({"scores": fails}, r"scores\(\) fails: ValueError"),
        ({"scores": lambda totals: list(totals)}, r"scores\(\) must return a dict"),
        ({"scores": lambda _: {"loss": 1}}, "a metric is named 'loss'"),
        ({"inputs": fails}, r"inputs\(\) fails"),
        ({"inputs": lambda x: x.long()}, r"must have one float tensor.*got \(2, 2, 8\) t"),
        ({"inputs": lambda x: x[..., :3]}, r"the network fails on \(2, 2, 3\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_task_is_said(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(task=lambda: Signals(**changes)))
    with pytest.raises(UsageError, match=message):
        try_task("mine:task", load_task("mine:task", {}), signal_network())


class Later(Rows):
    """Item 4 cannot be read for ``reason``, or has another shape."""

    def __init__(self, reason: Exception | None = None) -> None:
        super().__init__(6)
        self.reason = reason

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 4 and self.reason:
            raise self.reason
        inputs, target = super().__getitem__(index)
        return inputs[:, : 8 - (index == 4)], target


@pytest.mark.parametrize(
    ("reason", "kind", "message"),
    [
        (OSError("file 4 is gone"), DataError, r"item 4 .*OSError: file 4 is gone \(test_tasks"),
        (OSError(errno.EIO, "disk"), StorageError, r"item 4 cannot be read: OSError: .*disk"),
        (KeyError("of my own"), DataError, r"items 3, 4 cannot be read: KeyError: .*of my own"),
        (None, DataError, r"items 3, 4 cannot be read: ValueError: items of several shapes"),
    ],
)
def test_an_item_that_fails_later_is_named(
    reason: Exception | None, kind: type[Exception], message: str
) -> None:
    items = TaskItems(ItemSplit(Later(reason), stack_items, "mine:task\0"))
    error = items.__getitems__([3, 4])  # returned, as by a loader process
    assert type(error) is kind
    assert re.match(f"--task mine:task: {message}", str(error))


def test_metrics_that_change_or_become_nan_are_named() -> None:
    objective = TaskObjective(Signals(metrics=lambda *_: {"other": (1, 1)}), {"right": 1})
    with pytest.raises(UsageError, match=r"returned other for a batch, and right before"):
        objective.measure(torch.rand(2, 3), torch.rand(2, 2, 8), torch.tensor([0, 1]))
    sums = torch.tensor([1.0, 2.0, torch.nan, 2.0], dtype=torch.float64)
    with pytest.raises(DataError, match="the metric right of a split is nan"):
        objective.scores(sums, 2)
    sums = torch.tensor([1.0, 2.0, 0, 0], dtype=torch.float64)
    with pytest.raises(DataError, match="the metric right, which chooses models, has no value"):
        objective.scores(sums, 2)
    sums = torch.tensor([torch.nan, 2.0, torch.nan, 2.0], dtype=torch.float64)
    assert objective.scores(sums, 2).loss != objective.scores(sums, 2).loss  # told by the epoch
    with pytest.raises(DataError, match=r"loss\(\) returned counts that sum up to 0 for a split"):
        objective.scores(torch.zeros(4, dtype=torch.float64), 2)
    objective = TaskObjective(Signals(scores=lambda _: {"a": torch.nan}), {"right": 1}, ("a",))
    with pytest.raises(DataError, match=r"a of a split is nan: scores\(\) returned it"):
        objective.scores(torch.ones(4, dtype=torch.float64), 2)


def test_a_method_that_fails_later_is_named() -> None:
    objective = TaskObjective(Signals(loss=fails), {"right": 1})
    with pytest.raises(DataError, match=r"loss\(\) of the task fails: .*own \(test_tasks.py, line"):
        objective.measure(torch.rand(2, 3), torch.rand(2, 2, 8), torch.tensor([0, 1]))


def test_the_loss_of_distillation_is_tried_where_it_is_used() -> None:
    task = Signals(distillation_loss=fails)
    try_task("mine:task", task, signal_network())
    with pytest.raises(UsageError, match=r"distillation_loss\(\) fails: ValueError"):
        try_task("mine:task", task, signal_network(), distilled=True)


def test_a_metric_without_a_count_has_no_value() -> None:
    objective = TaskObjective(Signals(), {"right": 1, "small": 2})
    sums = torch.tensor([3.0, 2.0, 1.0, 2.0, 0, 0, 0, 0], dtype=torch.float64)
    scores = objective.scores(sums, 2)
    assert dict(scores.metrics) == {"right": 0.5}
    assert not scores.others
    sums[-1] = 4  # of the second class alone
    assert objective.scores(sums, 2).others == {"small": 0.0}


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("clasification", (), "did you mean classification"),
        ("mine:none", (), "--task mine:none: no none in mine"),
        ("mine:broken", (), r"--task mine:broken cannot be built: ValueError: of my own"),
        ("mine:task", ("data",), "does not take --data: leave it out, or add the parameter data"),
    ],
)
def test_what_is_wrong_with_its_name_is_said(
    name: str, typed: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(task=Signals, broken=fails))
    with pytest.raises(UsageError, match=message):
        load_task(name, {"data": "d"}, typed)


def missing() -> Any:
    raise FileNotFoundError(2, "No such file or directory", "masks")


def test_a_card_names_only_the_users_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="code of an installed package; if you trust it, pass"):
        load_task("torchvision.ops:box_iou", {}, from_card=True)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(task=Signals, missing=missing))
    assert load_task("mine:task", {"seed": 3}, from_card=True)
    with pytest.raises(InputNotFound, match="masks"):
        load_task("mine:missing", {})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "--mean has no effect with --task mine:task"),
        ({"transform": "imagenet"}, "--transform has no effect"),
        ({"importance": "taylor"}, "--importance taylor needs the labels"),
    ],
)
def test_options_of_classification_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneConfig(task="mine:task", **more)


class Drawn:
    """Items of random numbers: by the global generators, or by the seed of ``sample``."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, tuple[float, float]]:
        return index + torch.rand(3), (random.random(), float(np.random.rand()))


class Seeded(Drawn):
    def sample(self, index: int, seed: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), seed


def test_an_item_is_a_function_of_its_row() -> None:
    """And neither the generators of the process nor the order of reading take part in it."""
    items, table = TaskItems(ItemSplit(Drawn(), stack_items)), epoch_table(4, 0, 1, 2)
    rows = table.rows(range(4))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    inputs, (python, numpy) = items.__getitems__(rows)
    assert inputs.floor().tolist() == [[row.index] * 3 for row in rows]
    torch.rand(7)
    again = items.__getitems__(rows[2:])
    assert torch.equal(again[0], inputs[2:])
    assert torch.equal(again[1][0], python[2:])
    assert torch.equal(again[1][1], numpy[2:])
    assert len(set(python.tolist())) == len(set(numpy.tolist())) == 4
    other = items.__getitems__(epoch_table(4, 0, 1, 3).rows(range(4)))
    assert not set(other[1][0].tolist()) & set(python.tolist())
    torch.set_rng_state(before[0])
    items.__getitems__(rows)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    seeds = TaskItems(ItemSplit(Seeded(), stack_items)).__getitems__(rows)[1]
    assert len(set(seeds.tolist())) == 4
    assert items.__getitems__([])[0].shape == (0, 3)


def test_batches_of_any_structure_are_stacked_and_divided() -> None:
    pairs = [({"a": torch.ones(2) * i, "b": np.zeros(3)}, (i, f"text {i}", True)) for i in range(5)]
    inputs, (number, text, flag) = stack_items(pairs)
    assert inputs["a"].shape == (5, 2)
    assert inputs["b"].shape == (5, 3)
    assert text == [f"text {i}" for i in range(5)]
    assert (number.dtype, flag.dtype) == (torch.int64, torch.bool)
    part = take_samples((inputs, (number, text, flag)), 1, 3)
    assert part[0]["a"].tolist() == [[1, 1], [2, 2]]
    assert part[1][1] == ["text 1", "text 2"]
    with pytest.raises(ValueError, match=r"several shapes, \(1,\) and \(2,\): add collate"):
        stack_items([torch.ones(1), torch.ones(2)])


def objective(task: Any, network: nn.Module) -> TaskObjective:
    return try_task("mine:task", task, network)


def trainer(task: Any, network: nn.Module, **options: Any) -> Trainer:
    data = task_dataset("mine:task", task, None)
    preprocessing = task_preprocessing(task, input_shape_of("mine:task", task))
    goal, accelerator = objective(task, network), start("cpu", "fp32")
    splits = data.splits
    assert isinstance(splits["validation"], ItemSplit)
    evaluator = TaskEvaluator(splits["validation"], goal, preprocessing.size, accelerator, 0)
    config = PruneConfig(task="mine:task", device="cpu", **options)
    shared = config, preprocessing, accelerator, 0, 1, goal
    return Trainer(splits["training"], evaluator, *shared)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_is_of_all_sums_over_all_counts(accumulate: int) -> None:
    """Pixels without a label do not count, however they are spread over the parts of a batch."""
    torch.manual_seed(0)
    network, task = UNet().eval(), Segmentation()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
    training = trainer(task, network, batch_size=12, accumulate=accumulate, optimizer="sgd", lr=1.0)
    run = TrainingRound(training, network, RoundSpec(0, 1), Unattended())
    run.prepared.eval()  # BatchNorm as in evaluation: parts do not matter
    training.sampler.set_epoch(0, 0)
    batch = next(iter(training.batches))
    run.optimizer.step = lambda *_: None  # type: ignore[method-assign]
    run.step(batch, 12, 0)
    reference = copy.deepcopy(network)
    images, masks = batch
    F.cross_entropy(reference(images), masks, ignore_index=-1).backward()
    assert (masks == -1).sum() > 0
    for (name, mine), own in zip(
        run.trained.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, own.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_process_without_a_sample_adds_nothing() -> None:
    network = UNet().train()
    goal = objective(Segmentation(), network)
    inputs = torch.rand(0, 1, 32, 32)
    loss, sums = goal.measure(network(inputs), inputs, torch.zeros(0, 32, 32).long())
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert not sums.any()
    assert all(not p.grad.any() for p in network.parameters() if p.grad is not None)


def test_a_metric_is_the_mean_over_the_classes_that_have_a_count() -> None:
    goal = TaskObjective(Signals(), {"iou": 3, "right": 1})
    sums = torch.tensor([6.0, 4, 1, 0, 3, 2, 0, 4, 3, 4], dtype=torch.float64)
    scores = goal.scores(sums, 9)
    assert scores.loss == 1.5
    assert scores.metrics == {"iou": 0.5 * (1 / 2 + 3 / 4), "right": 0.75}
    assert (scores.accuracy, scores.others) == (0.625, {"right": 0.75})
    assert goal.scores(torch.zeros(10), 0).accuracy == 0


def test_scores_are_made_of_the_sums_of_the_whole_split() -> None:
    def scores(totals: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        sums, counts = totals["right"]
        assert (sums.shape, counts.dtype) == ((1,), torch.float64)
        return {"kappa": 2 * float(sums / counts) - 1, "share": float(sums / counts)}

    goal = objective(Signals(scores=scores), signal_network())
    assert goal.metric == "kappa"
    found = goal.scores(torch.tensor([6.0, 4, 3, 4], dtype=torch.float64), 4)
    assert found.metrics == {"kappa": 0.5, "share": 0.75}


def test_signals_are_trained_by_the_trainer_and_with_a_teacher() -> None:
    """Inputs (C, L), which are no images; the teacher's part of the loss is the task's."""

    class Distilled(Signals):
        def distillation_loss(
            self, outputs: torch.Tensor, teacher: torch.Tensor, temperature: float
        ) -> torch.Tensor:
            return temperature * F.mse_loss(outputs, teacher, reduction="sum")

    from job.training.distillation import distillation

    network, task = signal_network(), Distilled()
    training = trainer(task, network, batch_size=4, lr=0.05)
    best = training.fit(network, RoundSpec(0, 5))
    assert best.metric == "right"
    assert 0 <= best.valid_acc <= 1
    teacher = distillation(network, 1.0, 2.0, training.accelerator)
    inputs, targets = torch.rand(3, 2, 8), torch.tensor([0, 1, 2])
    loss, sums = training.objective.measure(network.eval()(inputs), inputs, targets, teacher)
    assert loss.item() == pytest.approx(0, abs=1e-6)  # the network is its own teacher
    assert float(sums[1]) == 3


def test_records_are_named_by_the_metric_and_read_again() -> None:
    epoch = EpochResult(
        1, 0, 9, 0.1, 0.5, 0.2, 0.6, 0.01, 5.0, 1.0, metric="iou", metrics={"b": 1.0}
    )
    content = to_json(epoch)
    assert (content["train_iou"], content["valid_iou"]) == (0.5, 0.6)
    assert "valid_acc" not in content
    assert from_json(EpochResult, json.loads(json.dumps(content))) == epoch
    costs = {"channels": 1, "params": 1, "macs": 1, "bytes": 1}
    entry = RoundRecord(round=1, width=1.0, **costs, valid_acc=0.5, valid_loss=0.1, step=3)
    assert to_json(entry)["valid_acc"] == 0.5
    assert not {"metric", "metrics"} & set(to_json(entry, everything=True))
    named = RoundRecord(**{**asdict(entry), "metric": "iou", "valid_acc_pruned": 0.2})
    assert from_json(RoundRecord, to_json(named)) == named
    with pytest.raises(ValueError, match="valid_iou is missing"):
        from_json(RoundRecord, to_json(entry) | {"metric": "iou"})
