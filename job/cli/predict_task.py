"""``predict`` of a model of a built-in task: a CSV of classes, masks, or COCO's JSON of boxes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from job.cli.open_model import open_model
from job.config import DETECTION
from job.console import counted, print_result, progress, say
from job.data.dataset import Dataset
from job.data.image_check import check_images
from job.data.layout import open_unlabelled
from job.data.split_names import CANONICAL
from job.distributed.collectives import gather, on_main, start
from job.errors import UsageError, shown, writing
from job.files import check_output, write_output
from job.processes import is_main, rank, world_size
from job.tasks.predictions import PREDICTORS, coco_split, label_row
from job.tasks.segmentation import SEGMENTATION
from job.training.evaluation import batch_size_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions, PredictOptions
    from job.data.splits import FileSplit
    from job.files import JsonObject

STDOUT = "-"
LARGEST_BATCH = 16  # images in a batch; each image may be large


def predict_task(
    model: ModelOptions, options: PredictOptions, output: str, card: ModelCard
) -> None:
    """Write what the model of ``card`` predicts for each image, in the format of its task.

    Each process predicts a share of the images. Raises UsageError for a task of the user.
    """
    _check(card, options, output)
    accelerator = start(options.device, options.precision)
    network, card = on_main(lambda: open_model(model))
    if output != STDOUT and card.task != SEGMENTATION:
        on_main(lambda: check_output(Path(output)))
    data, ids, categories = on_main(lambda: _open(options, card))
    split: Any = data.splits["testing"]
    network.to(accelerator.device).eval()
    mine = range(rank(), len(split), world_size())
    size, found = min(LARGEST_BATCH, batch_size_at(card.preprocessing.size)), {}
    starts = range(0, len(mine), size)
    for first in progress("predicting")(starts, len(starts)):
        numbers = mine[first : first + size]
        images = [split.image(number) for number in numbers]
        how = card.preprocessing, accelerator.device
        with accelerator.autocast():
            made = PREDICTORS[card.task](network, images, *how)
        for number, each in zip(numbers, made, strict=True):
            if card.task == SEGMENTATION:
                _write_mask(Path(output), split.name(number), each)
            found[number] = None if card.task == SEGMENTATION else each
    every: dict[int, Any] = {}
    for share in gather(found):
        every |= share
    if card.task == DETECTION:
        _write(output, boxes_json(split, every, ids, categories))
    elif card.task != SEGMENTATION:
        _write(output, labels_csv(split, every, card.class_names))
    place = "on standard output" if output == STDOUT else f"in {shown(output)}"
    say(f"{counted(len(every), 'prediction')} of {data.root} {place}")


def _check(card: ModelCard, options: PredictOptions, output: str) -> None:
    if card.task not in PREDICTORS:
        raise UsageError(
            f"predict takes models of --task {', '.join(PREDICTORS)} and of classification; for "
            f"{card.task}, load the model in Python, gammaslim.load(PATH)"
        )
    if options.data is None:
        raise UsageError(f"predict needs --data for the task {card.task}: a folder of images")
    if options.format != "auto":
        raise UsageError(f"--format {options.format} is for classification: leave it out")
    if card.task == SEGMENTATION and (output == STDOUT or Path(output).is_file()):
        raise UsageError(f"--output {shown(output)}: masks need a folder")


def _open(
    options: PredictOptions, card: ModelCard
) -> tuple[Dataset, list[int] | None, Mapping[int, int]]:
    """Return the images as the split ``testing``, and ids and categories of a JSON file."""
    path, name = Path(str(options.data)), options.split
    name = CANONICAL.get(name.lower(), name) if name else None
    labelled = None
    if card.task == DETECTION and path.exists() and (path.is_dir() or path.suffix == ".json"):
        labelled = coco_split(path, name, card.class_names)
    if labelled is None and name:
        raise UsageError(f"--split {name} has no effect on a folder of images: leave it out")
    if labelled:
        split, ids, categories = labelled
        return Dataset(shown(path), (), {"testing": split}), ids, categories
    data, _ = check_images(open_unlabelled(path), ["testing"], options.on_bad_image)
    for note in data.notes:
        say(f"data: {note}")
    if data.skipped:
        say(f"left out: {counted(len(data.skipped), 'image')} that cannot be read")
    return data, None, {}


def _write(output: str, content: bytes) -> None:
    if output != STDOUT:
        on_main(lambda: write_output(Path(output), content))
    elif is_main():
        print_result(content)


def _write_mask(folder: Path, name: str, mask: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Write a mask as a PNG of class numbers, under the name of its image."""
    path = (folder / name).with_suffix(".png")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())


def labels_csv(
    split: FileSplit, found: Mapping[int, list[float]], class_names: tuple[str, ...]
) -> bytes:
    """Return rows of a file, its classes separated by |, and the probability of each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "labels", *class_names))
    for number in sorted(found):
        writer.writerow((split.name(number), *label_row(found[number], class_names)))
    return text.getvalue().encode("utf-8", "surrogateescape")


def boxes_json(
    split: FileSplit,
    found: Mapping[int, list[tuple[list[float], int, float]]],
    ids: list[int] | None,
    categories: Mapping[int, int],
) -> bytes:
    """Return boxes in COCO's results format.

    If ``ids`` is None, because the images have no JSON file, ``image_id`` is the index of an image,
    ``file_name`` its name, and ``category_id`` the label of the network.
    """
    results: list[JsonObject] = []
    for number in sorted(found):
        image: JsonObject = {"image_id": ids[number] if ids else number}
        if not ids:
            image["file_name"] = split.name(number)
        for box, label, score in found[number]:
            category = categories.get(label, label)
            results.append(image | {"category_id": category, "bbox": box, "score": score})
    return json.dumps(results).encode() + b"\n"
