"""Open MODEL of a command line: a run, round or model folder, or a weights file with --model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.model_card import ModelCard, find_model, load_model
from job.artifacts.records import Lineage
from job.config import DETECTION, LOGIT_TASKS
from job.console import say, say_aside
from job.data.preprocessing_options import PreprocessingOptions
from job.distributed.collectives import digest
from job.errors import DataError, UsageError, shown
from job.models.custom_network import trust_factory
from job.models.detectors import fit_to_card
from job.models.factory import (
    build_network,
    build_with_note,
    nominal_classes,
    nominal_size,
    nominal_width,
)
from job.models.input_size import check_size
from job.models.weights import count_classes, load_state
from job.models.weights_file import read_state

if TYPE_CHECKING:
    from torch import nn

    from job.cli.command_options import ModelOptions
    from job.data.preprocessing import Preprocessing


def open_model(options: ModelOptions, largest: int = 0) -> tuple[nn.Module, ModelCard]:
    """Return the network of MODEL in eval mode, and its card.

    A weights file has no card: its preprocessing follows from ``largest``, the largest side of any
    image. Raises InputNotFound, DataError or UsageError.
    """
    path, asked = Path(options.path), PreprocessingOptions.of(options)
    asked.check()
    if options.model:
        trust_factory(options.model)
    if path.is_dir() or not path.exists():
        folder = find_model(path)
        network, card = load_model(folder)
        if not options.image_size:
            _check_own_size(network, card, folder)
        card = replace(card, preprocessing=asked.override(card.preprocessing))
        if card.task == DETECTION:
            fit_to_card(network, card.preprocessing)
    else:
        network, card = _open_weights(options, path, largest)
    size, classifier = card.preprocessing.input_size, card.task in LOGIT_TASKS
    check_size(network, size, trained=False, classifier=classifier)
    return network, card


def _check_own_size(network: nn.Module, card: ModelCard, folder: Path) -> None:
    size, classifier = card.preprocessing.input_size, card.task in LOGIT_TASKS
    try:
        check_size(network, size, trained=False, classifier=classifier)
    except UsageError as error:
        path = shown(folder / "model.json")
        inputs = f"{size} pixels" if isinstance(size, int) else str(size)
        raise DataError(f"{path}: its network does not take inputs of {inputs}") from error


def _preprocessing(options: ModelOptions, model: str, largest: int) -> Preprocessing:
    """Return the preprocessing for a weights file.

    By default the size of the input follows from ``largest``, the largest side of any image, or
    without images (0) it is the nominal one of the network.
    """
    asked = PreprocessingOptions.of(options)
    sized = any((options.image_size, options.crop, options.resize))
    size = nominal_size(model)
    if largest or sized or options.transform not in ("auto", "small"):
        chosen = asked.resolve(largest or options.image_size or size or 0)
        if largest and not sized and options.transform == "auto":
            say_aside(
                f"input size: {chosen.size} pixels, because of the images; --image-size changes it"
            )
        return chosen
    if size is None:
        raise UsageError(
            f"{shown(options.path)} is a weights file: give the side of the images that {model} is "
            "made for, e.g. --image-size 32"
        )
    say_aside(f"input size: {size} pixels, which {model} is made for; --image-size changes it")
    return replace(asked, image_size=size).resolve(size)


def _open_weights(options: ModelOptions, path: Path, largest: int) -> tuple[nn.Module, ModelCard]:
    if options.model is None:
        raise UsageError(f"{shown(path)} is a weights file: name its network, e.g. --model student")
    state = read_state(path)
    args = dict(options.model_arg)
    classes = options.num_classes or nominal_classes(options.model)
    network, note = build_with_note(options.model, classes, args)
    if options.num_classes:
        notes = [note] if note else []
    else:
        notes, count = [], count_classes(network, state)
        if count and count != classes:
            classes, network = count, build_network(options.model, count, args)
    for line in (*notes, *load_state(network, state, shown(path)).notes):
        say(line)
    preprocessing = _preprocessing(options, options.model, largest)
    width = nominal_width(options.model, args)
    lineage = Lineage(base_weights=shown(path), base_sha256=digest(state))
    card = ModelCard(
        options.model, args, classes, preprocessing=preprocessing, width=width, lineage=lineage
    )
    return network.eval(), card
