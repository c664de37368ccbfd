"""Run a model over a split: ``evaluate`` and ``predict``."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from job.artifact import find_model, read_card
from job.commands.model import ModelOptions, open_model
from job.console import progress, say, table
from job.data import Dataset, Split, check_pictures, open_data
from job.data.batches import default_workers
from job.data.dataset import with_validation
from job.errors import DataError, shown
from job.files import check_output, write_output
from job.preparation import SPLITS as TRAINING_SPLITS
from job.processes import local_world, on_main, start
from job.training.evaluation import Evaluation, Evaluator

if TYPE_CHECKING:
    import torch

    from job.artifact import ModelCard


@dataclass(frozen=True)
class DataOptions:
    """Which pictures to use, and where to run."""

    data: str | None
    split: str
    on_bad_image: str
    device: str
    precision: str
    workers: int | None
    seed: int | None


def evaluate(model: ModelOptions, options: DataOptions, as_json: bool) -> None:
    """Print loss, accuracy, per-class accuracy and the confusion matrix of one split."""
    accelerator = start(options.device, options.precision)
    data, largest = on_main(lambda: _open_split(model, options, labelled=True))
    network, card = on_main(lambda: open_model(model, largest))
    split = in_classes_of(card, data, data.split(options.split))
    workers = _workers(options, accelerator.device)
    evaluator = Evaluator(split, card.num_classes, card.preprocessing, accelerator, workers)
    bar = progress("evaluating")
    result = evaluator(network, lambda batches: bar(batches, len(evaluator.batches)))
    if not math.isfinite(result.loss):
        raise DataError(
            f"the loss of {shown(model.path)} is {result.loss}: its weights are damaged"
        )
    names = card.class_names or tuple(str(number) for number in range(card.num_classes))
    if as_json:
        say(json.dumps(_evaluation_record(result, names, data, options.split), indent=1))
    else:
        say(_evaluation_text(result, names, data, options.split))


def _seed(model: ModelOptions, options: DataOptions) -> int:
    """The seed that held out the validation pictures: that of MODEL's run, unless one is given."""
    if options.seed is None and Path(model.path).is_dir():
        return int(read_card(find_model(model.path)).lineage.get("seed", 0))
    return options.seed or 0


def _open_split(
    model: ModelOptions, options: DataOptions, *, labelled: bool
) -> tuple[Dataset, int]:
    """The data set with only the split that is asked for, and the largest side of any picture.

    Pictures are checked first where the result depends on it: a tenth is held out of those that
    can be read, as ``prune`` does it, and a weights file's preset follows from all their sizes.
    """
    model.check()
    data, name = open_data(options.data), options.split
    held_out = name in ("training", "validation") and "validation" not in data.splits
    held_out = held_out and "training" in data.splits
    unsized = model.transform == "auto" and Path(model.path).is_file()
    if not held_out:
        data.split(name)  # fails before any picture is read
    trained = [split for split in TRAINING_SPLITS if split in data.splits]
    checked, largest = trained if held_out or unsized else [], 0
    data, largest = check_pictures(data, checked, options.on_bad_image, progress("checking"))
    if held_out:
        data = with_validation(data, _seed(model, options))
    split = data.labelled(name) if labelled else data.split(name)
    data = replace(data, splits={name: split})
    if name not in checked and not held_out and options.on_bad_image == "skip":
        data, own = check_pictures(data, [name], options.on_bad_image, progress("checking"))
        largest = largest or own
    elif unsized and not largest:
        data, largest = check_pictures(data, [name], options.on_bad_image, progress("checking"))
    return data, largest


def in_classes_of(card: ModelCard, data: Dataset, split: Split) -> Split:
    """``split`` with its labels as the model numbers classes; raises DataError for others.

    Named classes are matched by name; numbered ones are taken as they are.
    """
    if not card.class_names or data.numbered or data.class_names == card.class_names:
        return split
    index = {name: number for number, name in enumerate(card.class_names)}
    unknown = [name for name in data.class_names if name not in index]
    if unknown:
        raise DataError(
            f"{data.root} has the class {unknown[0]!r}, which the model does not know; "
            f"its classes: {', '.join(card.class_names[:12])}"
        )
    numbers = np.array([index[name] for name in data.class_names])
    everything = np.arange(len(split))
    return split.take(everything, numbers[split.labels])


def _workers(options: DataOptions, device: torch.device) -> int:
    if options.workers is not None:
        return options.workers
    return default_workers(local_world(), device.type == "cuda")


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
        f"{split} split of {data.root}: {result.count:,} pictures",
        f"loss {result.loss:.4f}, accuracy {result.accuracy:.4f}",
        "",
        table(("class", "pictures", "accuracy"), rows),
    ]
    if data.skipped:
        parts.insert(1, f"{len(data.skipped)} pictures that cannot be read are left out:")
        parts[2:2] = [f"  {shown(name)}" for name in data.skipped]
    if len(names) <= 20:
        header = ("true \\ predicted", *(str(number) for number in range(len(names))))
        lines = [
            (f"{number} {shown(name)}", *map(str, row))
            for number, (name, row) in enumerate(zip(names, result.confusion.tolist(), strict=True))
        ]
        parts += ["", table(header, lines)]
    return "\n".join(parts)


def _ids(options: DataOptions, data: Dataset, split: Split) -> list[int]:
    """The number that each file's name is, if they all are different ones; else places."""
    names = [split.name(index) for index in range(len(split))]
    stems = [Path(name).stem for name in names]
    if all(stem.isdecimal() for stem in stems) and len({int(s) for s in stems}) == len(stems):
        return [int(stem) for stem in stems]
    if not data.skipped:
        return list(range(len(names)))
    whole = open_data(options.data).split(options.split)  # skipped pictures keep their places
    places = {whole.name(index): index for index in range(len(whole))}
    return [places[name] for name in names]


def predict(model: ModelOptions, options: DataOptions, output: str) -> None:
    """Write ``Id,Category`` rows in file order, the homework's Kaggle format.

    Id is the number that is a file's whole name (0007.jpg: 7) where these differ, else its place.
    """
    accelerator = start(options.device, options.precision)
    on_main(lambda: check_output(Path(output)))
    data, largest = on_main(lambda: _open_split(model, options, labelled=False))
    network, card = on_main(lambda: open_model(model, largest))
    split = data.split(options.split)
    split = split.take(np.arange(len(split)), 0 * split.labels)  # any class fits
    workers = _workers(options, accelerator.device)
    evaluator = Evaluator(split, card.num_classes, card.preprocessing, accelerator, workers)
    bar = progress("predicting")
    classes = evaluator.predict(network, lambda batches: bar(batches, len(evaluator.batches)))
    ids = _ids(options, data, split)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("Id", "Category"))
    rows.writerows(zip(ids, classes, strict=True))
    on_main(lambda: write_output(Path(output), text.getvalue().encode()))
    say(f"{len(classes):,} predictions in {shown(output)}")
    if data.skipped:
        say(f"{len(data.skipped)} pictures that cannot be read are left out:")
        say("\n".join(f"  {shown(name)}" for name in data.skipped))
