"""``evaluate`` of a model that was trained for another task: its loss and metrics on a split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.model_card import find_model, read_card
from job.artifacts.provenance import find_task_data
from job.cli.evaluation_images import loader_workers
from job.cli.open_model import open_model
from job.console import counted, print_result, progress
from job.data.task_items import ItemSplit
from job.distributed.collectives import on_main, start
from job.errors import DataError, InputNotFound, UsageError, shown
from job.pipeline.task_data import agree_objective, task_dataset
from job.tasks.image_task import TaskOptions
from job.tasks.loading import load_task
from job.training.task_evaluation import TaskEvaluator

if TYPE_CHECKING:
    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import EvaluateOptions, ImageOptions, ModelOptions
    from job.data.dataset import Dataset
    from job.data.splits import Split
    from job.files import JsonObject
    from job.training.objective import SplitScores
    from job.training.task import Task


def card_of_task(model: ModelOptions) -> ModelCard | None:
    """Return the card of MODEL if it was trained for another task than classification, else None.

    Raises InputNotFound or DataError.
    """
    path = Path(model.path)
    card = None if path.is_file() else read_card(find_model(path))
    return None if card is None or card.is_classifier else card


def refuse_task(model: ModelOptions, command: str, advice: str) -> None:
    """Raise UsageError if MODEL was trained for another task, which ``command`` does not take."""
    if card := card_of_task(model):
        raise UsageError(
            f"{command} takes classifiers; {shown(model.path)} was trained for the task "
            f"{card.task}: {advice}"
        )


def open_task_of(
    model: ModelOptions, options: ImageOptions, card: ModelCard
) -> tuple[Task, Dataset]:
    """Return the task of MODEL's ``card``, and its data set: --data, or the data of its run."""
    data = options.data or find_task_data(model.path, card.lineage)
    seed, made = card.lineage.seed or 0, card.preprocessing
    images = TaskOptions(data, made, options.on_bad_image, seed, made.max_side)
    given = {"data": data, "seed": seed, "image_size": made.size, "options": images}
    typed = ("data",) if options.data else ()
    task = load_task(card.task, given, typed, from_card=True)
    return task, task_dataset(card.task, task, data)


def evaluate_task(
    model: ModelOptions, options: EvaluateOptions, card: ModelCard, as_json: bool
) -> None:
    """Print loss and metrics of one split of the task in ``card``."""
    accelerator = start(options.device, options.precision)
    task, dataset = open_task_of(model, options, card)
    name, size, data = options.split or "validation", card.preprocessing.size, dataset.source
    if name not in dataset.splits:
        has = ", ".join(dataset.splits)
        raise InputNotFound(f"the task {card.task} has no {name} data; --split can be {has}")
    split = dataset.splits[name]
    assert isinstance(split, ItemSplit)
    network, _ = on_main(lambda: open_model(model))
    objective = agree_objective(card.task, task, network)
    workers = loader_workers(options, accelerator.device)
    evaluator = TaskEvaluator(split, objective, size, accelerator, workers)
    bar = progress("evaluating")
    scores = evaluator(network, lambda batches: bar(batches, len(evaluator.batches)))
    if not math.isfinite(scores.loss):
        raise DataError(
            f"the loss of {shown(model.path)} is {scores.loss}: its weights are damaged"
        )
    if as_json:
        print_result(json.dumps(_record(card, data or None, name, split, scores), indent=1))
        return
    metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.metrics.items())
    print_result(
        f"{name} split of the task {card.task}: {counted(len(split), 'item')}\n"
        f"loss {scores.loss:.4f}, {metrics}"
    )


def _record(
    card: ModelCard, data: str | None, name: str, split: Split, scores: SplitScores
) -> JsonObject:
    """Return what ``--json`` prints: metrics by their names."""
    return {
        "task": card.task,
        "data": data,
        "split": name,
        "count": len(split),
        "loss": scores.loss,
        **scores.metrics,
    }
