"""Run a model over a split: ``evaluate`` and ``predict``."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from job.cli.evaluation_images import Chosen, DataOptions, open_chosen
from job.cli.model import ModelOptions, open_model
from job.console import counted, progress, say, say_cautions, table
from job.data.layout import IMAGES_ONLY
from job.data.loader import default_workers
from job.data.splits import UNLABELLED
from job.distributed.collectives import on_main, start
from job.errors import DataError, shown
from job.files import check_output, write_output
from job.pipeline.cautions import of_model, one_class
from job.processes import local_world_size
from job.training.evaluation import Evaluation, Evaluator

if TYPE_CHECKING:
    import torch

    from job.artifacts.model_card import ModelCard
    from job.data.dataset import Dataset
    from job.data.splits import Split


def evaluate(model: ModelOptions, options: DataOptions, as_json: bool) -> None:
    """Print loss, accuracy, per-class accuracy and the confusion matrix of one split."""
    accelerator = start(options.device, options.precision)
    chosen = on_main(lambda: open_chosen(model, options, labelled=True))
    data = chosen.data
    network, card = on_main(lambda: open_model(model, chosen.largest))
    split = in_classes_of(card, data, chosen.split)
    workers = _workers(options, accelerator.device)
    evaluator = Evaluator(split, card.num_classes, card.preprocessing, accelerator, workers)
    bar = progress("evaluating")
    result = evaluator(network, lambda batches: bar(batches, len(evaluator.batches)))
    if not math.isfinite(result.loss):
        raise DataError(
            f"the loss of {shown(model.path)} is {result.loss}: its weights are damaged"
        )
    names = card.class_names or tuple(str(number) for number in range(card.num_classes))
    counts, weights = result.confusion.sum(1).tolist(), Path(model.path).is_file()
    found = (of_model(result.accuracy, counts, weights=weights), one_class(result, names))
    cautions = [caution for caution in found if caution]
    if as_json:
        record = _evaluation_record(result, names, data, chosen.name)
        say(json.dumps(record | {"cautions": cautions}, indent=1))
    else:
        say(_evaluation_text(result, names, data, chosen.name))
        say_cautions(cautions)


def in_classes_of(card: ModelCard, data: Dataset, split: Split) -> Split:
    """``split`` with its labels as the model numbers classes; raises DataError for others.

    Named classes are matched by name; numbered ones are taken as they are.
    """
    if not card.class_names or data.class_names == card.class_names:
        return split
    if data.numbered and not all(name.isdecimal() for name in card.class_names):
        return split
    index = {name: number for number, name in enumerate(card.class_names)}
    there = {data.class_names[number] for number in np.unique(split.labels) if number >= 0}
    unknown = [name for name in data.class_names if name in there and name not in index]
    if unknown:
        raise DataError(
            f"{data.root} has the class {unknown[0]!r}, which the model does not know; "
            f"its classes: {', '.join(card.class_names[:12])}"
        )
    numbers = np.array([index.get(name, 0) for name in data.class_names])
    everything = np.arange(len(split))
    return split.select(everything, numbers[split.labels])


def _workers(options: DataOptions, device: torch.device) -> int:
    if options.workers is not None:
        return options.workers
    return default_workers(local_world_size(), device.type == "cuda")


def _evaluation_record(
    result: Evaluation, names: tuple[str, ...], data: Dataset, split: str
) -> dict[str, Any]:
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
    }


def _evaluation_text(result: Evaluation, names: tuple[str, ...], data: Dataset, split: str) -> str:
    counts = result.confusion.sum(1).tolist()
    rows = [
        (shown(name), f"{count:,}", "" if accuracy is None else f"{accuracy:.4f}")
        for name, count, accuracy in zip(names, counts, result.class_accuracy, strict=True)
    ]
    parts = [
        *(f"data: {note}" for note in data.notes),
        f"{split} split of {data.root}: {result.count:,} images",
        f"loss {result.loss:.4f}, accuracy {result.accuracy:.4f}",
        "",
        table(("class", "images", "accuracy"), rows),
    ]
    if data.skipped:
        at = len(data.notes) + 1
        bad = [f"  {shown(name)}" for name in data.skipped]
        parts[at:at] = [f"{len(bad)} images that cannot be read are left out:", *bad]
    if len(names) <= 20:
        header = ("true \\ predicted", *(str(number) for number in range(len(names))))
        lines = [
            (f"{number} {shown(name)}", *map(str, row))
            for number, (name, row) in enumerate(zip(names, result.confusion.tolist(), strict=True))
        ]
        parts += ["", table(header, lines)]
    return "\n".join(parts)


def predict(model: ModelOptions, options: DataOptions, output: str, format: str = "auto") -> None:
    """Write a row for each image, in file order: file, class name and probability, or Kaggle's.

    ``kaggle`` is the homework's ``Id,Category``: Id is the number that is a file's whole name
    (0007.jpg: 7) where these differ, else its place. ``auto`` takes it for a split of such files.
    """
    accelerator = start(options.device, options.precision)
    on_main(lambda: check_output(Path(output)))
    chosen = on_main(lambda: open_chosen(model, options, labelled=False))
    network, card = on_main(lambda: open_model(model, chosen.largest))
    split = chosen.split.select(np.arange(len(chosen.split)), 0 * chosen.split.labels)  # any fits
    workers = _workers(options, accelerator.device)
    evaluator = Evaluator(split, card.num_classes, card.preprocessing, accelerator, workers)
    bar = progress("predicting")
    classes, shares = evaluator.predict(
        network, lambda batches: bar(batches, len(evaluator.batches))
    )
    names = [card.class_names[number] if card.class_names else str(number) for number in classes]
    there = [number != UNLABELLED for number in classes]
    kaggle = format == "kaggle" or (format == "auto" and chosen.split_of_numbers)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    if kaggle:
        rows.writerow(("Id", "Category"))
        rows.writerows(compress(zip(chosen.ids(), names, strict=True), there))
    else:
        files = map(split.name, range(len(split)))
        rows.writerow(("file", "class", "probability"))
        told = (f"{share:.6f}" for share in shares)
        rows.writerows(compress(zip(files, names, told, strict=True), there))
    content = text.getvalue().encode("utf-8", "surrogateescape")  # names as the files have them
    on_main(lambda: write_output(Path(output), content))
    _say_predictions(chosen, sum(there), output, auto=format == "auto" and kaggle)


def _say_predictions(chosen: Chosen, count: int, output: str, *, auto: bool) -> None:
    data = chosen.data
    for note in data.notes:
        say(f"data: {note}")
    what = "Id,Category, as the files are numbered; --format csv has names" if auto else ""
    of = f"the {chosen.name} split of {data.root}" if data.layout != IMAGES_ONLY else data.root
    say(f"{counted(count, 'prediction')} of {of} in {shown(output)}{f' ({what})' if what else ''}")
    if data.skipped:
        say(f"{len(data.skipped)} images that cannot be read are left out:")
        say("\n".join(f"  {shown(name)}" for name in data.skipped))
