"""``predict``: the class of each image, in file order."""

from __future__ import annotations

import csv
import io
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job.cli.evaluate_task import card_of_task
from job.cli.evaluation_images import (
    EvaluationImages,
    loader_workers,
    open_evaluation_images,
)
from job.cli.open_model import open_model
from job.cli.predict_task import STDOUT, predict_task
from job.console import counted, print_result, progress, say
from job.data.layout import IMAGES_ONLY
from job.data.splits import UNLABELLED
from job.distributed.collectives import on_main, start
from job.errors import shown
from job.files import check_output, write_output
from job.processes import is_main
from job.training.evaluation import Evaluator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from job.cli.command_options import ModelOptions, PredictOptions


def predict(model: ModelOptions, options: PredictOptions, output: str) -> None:
    """Write the class of each image to ``output``, or to standard output for ``-``.

    A row has the file, the name of its class and the probability, or ``Id,Category`` in the
    homework's ``kaggle`` format. The Id is the number of the file (7 for 0007.jpg) if all files
    have distinct numbers, else the index of the image in the split.
    """
    if card := card_of_task(model):
        predict_task(model, options, output, card)
        return
    accelerator = start(options.device, options.precision)
    if output != STDOUT:
        on_main(lambda: check_output(Path(output)))
    images = on_main(lambda: open_evaluation_images(model, options, labelled=False))
    network, card = on_main(lambda: open_model(model, images.largest))
    zeros = np.zeros_like(images.split.labels)  # a label that every network has
    split = images.split.select(np.arange(len(images.split)), zeros)
    workers = loader_workers(options, accelerator.device)
    evaluator = Evaluator(split, card.num_classes, card.preprocessing, accelerator, workers)
    bar = progress("predicting")
    classes, probabilities = evaluator.predict(
        network, lambda batches: bar(batches, len(evaluator.batches))
    )
    names = [card.class_names[number] if card.class_names else str(number) for number in classes]
    readable = [number != UNLABELLED for number in classes]
    kaggle = options.format == "kaggle" or (options.format == "auto" and images.split_of_numbers)
    if kaggle:
        rows: Iterable[tuple[object, ...]] = zip(images.ids(), names, strict=True)
    else:
        formatted = (f"{probability:.6f}" for probability in probabilities)
        rows = zip(map(split.name, range(len(split))), names, formatted, strict=True)
    header = ("Id", "Category") if kaggle else ("file", "class", "probability")
    content = _csv(header, compress(rows, readable))
    if output != STDOUT:
        on_main(lambda: write_output(Path(output), content))
    elif is_main():
        print_result(content)
    _say_predictions(images, sum(readable), output, explain=options.format == "auto" and kaggle)


def _csv(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> bytes:
    """Format rows as CSV; names of files keep the bytes that they have on disk."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _say_predictions(images: EvaluationImages, count: int, output: str, *, explain: bool) -> None:
    data = images.data
    for note in data.notes:
        say(f"data: {note}")
    note = " (Id,Category, as the files are numbered; --format csv gives names)" if explain else ""
    source = f"the {images.name} split of {data.root}" if data.layout != IMAGES_ONLY else data.root
    place = "on standard output" if output == STDOUT else f"in {shown(output)}"
    say(f"{counted(count, 'prediction')} of {source} {place}{note}")
    if data.skipped:
        say(f"left out: {counted(len(data.skipped), 'image')} that cannot be read:")
        say("\n".join(f"  {shown(name)}" for name in data.skipped))
