"""``evaluate``: loss, accuracy and confusion matrix of MODEL on a split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from job.cli.class_matching import in_classes_of
from job.cli.evaluate_task import card_of_task, evaluate_task
from job.cli.evaluation_images import loader_workers, open_evaluation_images
from job.cli.open_model import open_model
from job.console import counted, print_result, progress, say_cautions, table
from job.distributed.collectives import on_main, start
from job.errors import DataError, shown
from job.pipeline.cautions import model_caution, single_class_caution
from job.training.evaluation import Evaluation, Evaluator

if TYPE_CHECKING:
    from job.cli.command_options import EvaluateOptions, ModelOptions
    from job.data.dataset import Dataset

LARGEST_CONFUSION = 20  # classes up to which the matrix is printed


def evaluate(model: ModelOptions, options: EvaluateOptions, as_json: bool) -> None:
    """Print loss, accuracy, accuracy of each class, and the confusion matrix of one split."""
    if card := card_of_task(model):
        evaluate_task(model, options, card, as_json)
        return
    accelerator = start(options.device, options.precision)
    images = on_main(lambda: open_evaluation_images(model, options, labelled=True))
    network, card = on_main(lambda: open_model(model, images.largest))
    split = in_classes_of(card, images.data, images.split)
    workers = loader_workers(options, accelerator.device)
    evaluator = Evaluator(split, card.num_classes, card.preprocessing, accelerator, workers)
    bar = progress("evaluating")
    result = evaluator(network, lambda batches: bar(batches, len(evaluator.batches)))
    if not math.isfinite(result.loss):
        raise DataError(
            f"the loss of {shown(model.path)} is {result.loss}: its weights are damaged"
        )
    names = card.class_names or tuple(str(number) for number in range(card.num_classes))
    counts, weights = result.confusion.sum(1).tolist(), Path(model.path).is_file()
    possible = (
        model_caution(result.accuracy, counts, weights=weights),
        single_class_caution(result, names),
    )
    cautions = [caution for caution in possible if caution]
    if as_json:
        record = _evaluation_json(result, names, images.data, images.name, cautions)
        print_result(json.dumps(record, indent=1))
    else:
        print_result(_evaluation_text(result, names, images.data, images.name))
        say_cautions(cautions)


class EvaluationJson(TypedDict):
    """What ``--json`` prints; the accuracy of a class without images is None."""

    data: str
    split: str
    count: int
    loss: float
    accuracy: float
    class_accuracy: dict[str, float | None]
    confusion: list[list[int]]
    class_names: list[str]
    skipped: list[str]
    cautions: list[str]


def _evaluation_json(
    result: Evaluation, names: tuple[str, ...], data: Dataset, split: str, cautions: list[str]
) -> EvaluationJson:
    return {
        "data": data.root,
        "split": split,
        "count": result.count,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "class_accuracy": dict(zip(names, result.class_accuracy, strict=True)),
        "confusion": result.confusion.tolist(),
        "class_names": list(names),
        "skipped": [shown(name) for name in data.skipped],
        "cautions": cautions,
    }


def _evaluation_text(result: Evaluation, names: tuple[str, ...], data: Dataset, split: str) -> str:
    counts = result.confusion.sum(1).tolist()
    rows = [
        (shown(name), f"{count:,}", "" if accuracy is None else f"{accuracy:.4f}")
        for name, count, accuracy in zip(names, counts, result.class_accuracy, strict=True)
    ]
    parts = [
        *(f"data: {note}" for note in data.notes),
        f"{split} split of {data.root}: {counted(result.count, 'image')}",
        f"loss {result.loss:.4f}, accuracy {result.accuracy:.4f}",
        "",
        table(("class", "images", "accuracy"), rows),
    ]
    if data.skipped:
        at = len(data.notes) + 1
        bad = [f"  {shown(name)}" for name in data.skipped]
        parts[at:at] = [f"left out: {counted(len(bad), 'image')} that cannot be read:", *bad]
    if len(names) <= LARGEST_CONFUSION:
        header = ("true \\ predicted", *(str(number) for number in range(len(names))))
        lines = [
            (f"{number} {shown(name)}", *map(str, row))
            for number, (name, row) in enumerate(zip(names, result.confusion.tolist(), strict=True))
        ]
        parts += ["", table(header, lines)]
    return "\n".join(parts)
