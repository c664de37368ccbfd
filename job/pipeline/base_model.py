"""The base of a run: a new network, one with given weights, or the slim model of another run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from job.artifacts.model_card import ModelCard, find_model, load_model, read_card
from job.artifacts.provenance import find_run_data, find_task_data
from job.artifacts.records import BaseRecord, Lineage
from job.config import DETECTION, LOGIT_TASKS, PruneConfig
from job.console import counted, say
from job.data.layout import BUILT_IN
from job.distributed.collectives import digest
from job.errors import DataError, InputNotFound, UsageError, shown
from job.files import is_file
from job.models.detectors import detector_preprocessing, fit_transform
from job.models.factory import build_with_note, nominal_width
from job.models.input_size import check_size
from job.models.weights import load_state
from job.models.weights_file import read_state
from job.pipeline.slim_round import base_of
from job.slimming.planning.base import layer_widths

if TYPE_CHECKING:
    from torch import nn

    from job.data.dataset import Dataset
    from job.data.preprocessing import Preprocessing

DEFAULTS = PruneConfig()


def find_model_folder(config: PruneConfig) -> Path | None:
    """Return the model folder that ``--weights`` names; None for a file, or without it.

    Raises InputNotFound or DataError for a folder without a model.
    """
    if not config.weights or not Path(config.weights).is_dir():
        return None
    return find_model(config.weights)


@dataclass(frozen=True)
class BaseWeights:
    """The content of ``--weights``: the state of a file or the model of a folder, or neither."""

    state: dict[str, torch.Tensor] | None = None
    model: tuple[nn.Module, ModelCard] | None = None


def read_base_weights(config: PruneConfig) -> BaseWeights:
    """Read ``--weights``; raises InputNotFound, DataError or StorageError."""
    if folder := find_model_folder(config):
        return BaseWeights(model=load_model(folder))
    return BaseWeights(state=read_state(config.weights) if config.weights else None)


def adopt_slim_base(config: PruneConfig) -> tuple[PruneConfig, Path | None]:
    """Return ``config`` with the network of the slim base, and the folder of the base, or None.

    Without ``--data`` the data of the base are adopted too. Raises UsageError when an option
    contradicts the base or its data are unknown, InputNotFound or DataError.
    """
    folder = find_model_folder(config)
    if folder is None:
        return config, None
    card, name = read_card(folder), f"--weights {shown(str(config.weights))}"
    what = f"{card.model} with {counted(card.num_classes, 'class')}"
    for option, given, default, stored in (
        ("--model", config.model, DEFAULTS.model, card.model),
        ("--model-arg", config.args, DEFAULTS.args, card.args),
        ("--num-classes", config.num_classes, DEFAULTS.num_classes, card.num_classes or None),
    ):
        if given not in (default, stored):
            raise UsageError(f"{name} has its own network, {what}: leave out {option}")
    if config.task not in (DEFAULTS.task, card.task):
        raise UsageError(f"{name} was trained for the task {card.task}: leave out --task")
    data = config.data
    if data is None and not card.is_classifier:
        data = find_task_data(str(config.weights), card.lineage)
    elif data is None:
        base_data = find_run_data(str(config.weights), card.lineage)
        say(f"data: {shown(base_data)}, the data of {shown(folder)}")
        data = None if base_data == BUILT_IN else base_data
    base_args = tuple(card.args.items())
    config = replace(
        config, model=card.model, model_arg=base_args, data=data, task=card.task,
        num_classes=card.num_classes or None,
    )  # fmt: skip
    return config, folder


def slim_base_preprocessing(config: PruneConfig) -> Preprocessing | None:
    """Return the slim base's preprocessing, which options override; None without such a base."""
    folder = find_model_folder(config)
    return read_card(folder).preprocessing if folder else None


def continue_slim_base(
    model: tuple[nn.Module, ModelCard],
    config: PruneConfig,
    data: Dataset,
    preprocessing: Preprocessing,
) -> tuple[nn.Module, ModelCard]:
    """Return the slim network and its card as the base of a new run.

    Fractions of the new run refer to this base. The ``layers`` of the card remain indices into the
    network as it was built originally. Raises DataError when ``data`` has other classes.
    """
    network, card = model
    check_classes(f"--weights {shown(str(config.weights))}", card, data.class_names)
    folder, sha = find_model_folder(config), digest(network.state_dict())
    assert folder
    lineage = Lineage(
        base_sha256=sha, seed=config.seed, listing=data.listing, base_weights=shown(folder),
        from_=card.lineage,
    )  # fmt: skip
    base, width = replace(base_of(network, card), slim=True), 1.0
    scaled: dict[str, int] = getattr(network, "uniform_widths", {})
    widths = layer_widths(network)
    if scaled and all(int(n * card.width + 1e-9) == widths[name] for name, n in scaled.items()):
        base, width = replace(base, slim=False), card.width  # as the homework counts it
    names = card.class_names or data.class_names
    return network, replace(
        card, preprocessing=preprocessing, class_names=names, width=width, metrics={},
        lineage=lineage, base=base,
    )  # fmt: skip


def check_classes(name: str, card: ModelCard, class_names: tuple[str, ...] | list[str]) -> None:
    """Raise DataError unless the model called ``name`` has the classes ``class_names``.

    Without class names in the model, only the number of classes is compared.
    """
    if card.num_classes < len(class_names):
        raise DataError(
            f"{name} has {counted(card.num_classes, 'class')}, the data have {len(class_names)}"
        )
    for number, (one, other) in enumerate(zip(card.class_names, class_names, strict=False)):
        if one != other:
            raise DataError(
                f"{name} names class {number} {shown(one)}, the data {shown(other)}: give the "
                "--data that it was trained on"
            )


def base_record(
    config: PruneConfig, card: ModelCard, teacher: nn.Module | None = None
) -> BaseRecord:
    """Return the origin of the base for config.toml; a run resumes only with the same one."""
    return BaseRecord(
        weights_sha256=card.lineage.base_sha256 or "",
        epochs=config.first_epochs,
        teacher_sha256=digest(teacher.state_dict()) if teacher else None,
    )


def load_teacher_network(config: PruneConfig, card: ModelCard) -> nn.Module | None:
    """Load the network of ``--teacher`` in eval mode; return None without the option.

    Raises InputNotFound, or DataError when its inputs or classes differ from those in ``card``.
    """
    if config.teacher is None:
        return None
    name, path = f"--teacher {shown(config.teacher)}", Path(config.teacher)
    if not any(is_file(path / file) for file in ("model.json", "summary.json", "config.toml")):
        raise InputNotFound(f"{name} is not a run, round or model folder")
    network, teacher_card = load_model(find_model(path))
    if teacher_card.num_classes != card.num_classes:
        raise DataError(
            f"{name} has {counted(teacher_card.num_classes, 'class')}, "
            f"this run has {card.num_classes}"
        )
    if (
        teacher_card.class_names
        and card.class_names
        and teacher_card.class_names != card.class_names
    ):
        pairs = zip(teacher_card.class_names, card.class_names, strict=True)
        number, (one, other) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
        raise DataError(f"{name} names class {number} {shown(one)}, this run {shown(other)}")
    took, given = teacher_card.preprocessing, card.preprocessing
    if took.inputs != given.inputs:
        raise DataError(
            f"{name} expects other inputs than this run: {took.describe()}, "
            f"not {given.describe()}; set --transform, --image-size, --mean, --std and "
            "--resize to the same values"
        )
    return network


def build_base_network(
    config: PruneConfig, data: Dataset, preprocessing: Preprocessing, weights: BaseWeights
) -> tuple[nn.Module, ModelCard]:
    """Build the base network, with ``weights`` if given, and its model card.

    Raises UsageError or DataError.
    """
    if weights.model:
        if config.task == DETECTION:
            preprocessing = _detector_inputs(weights.model[0], config, preprocessing)
        return continue_slim_base(weights.model, config, data, preprocessing)
    num_classes = config.num_classes or len(data.class_names)
    if num_classes < len(data.class_names):
        raise UsageError(
            f"--num-classes {num_classes} is less than the {len(data.class_names)} of the data"
        )
    torch.manual_seed(config.seed)
    classifier, detector = config.task in LOGIT_TASKS, config.task == DETECTION
    network, note = build_with_note(
        config.model, num_classes, config.args, classifier=classifier, detector=detector
    )
    if note:
        say(note)
    if detector:
        preprocessing = _detector_inputs(network, config, preprocessing)
    check_size(network, preprocessing.input_size, classifier=classifier)
    lineage = Lineage(seed=config.seed, listing=data.listing)
    if weights.state is not None:
        lineage = _load_base_weights(network, config, weights.state, lineage)
    unnamed = (str(number) for number in range(len(data.class_names), num_classes))
    card = ModelCard(
        model=config.model,
        args=config.args,
        num_classes=num_classes,
        preprocessing=preprocessing,
        class_names=(*data.class_names, *unnamed) if data.class_names or classifier else (),
        width=nominal_width(config.model, config.args),
        lineage=lineage,
        task=config.task,
    )
    return network, replace(card, base=base_of(network, card))


def _detector_inputs(
    network: nn.Module, config: PruneConfig, preprocessing: Preprocessing
) -> Preprocessing:
    """Apply the options to a detector's own preprocessing, and return that preprocessing."""
    fit_transform(network, config.image_size, config.mean, config.std)
    made = detector_preprocessing(network, preprocessing.max_side)
    sides = made.resize if made.shape is None else " x ".join(map(str, made.shape[1:]))
    say(f"data: the network resizes images: {sides} pixels")
    return made


def _load_base_weights(
    network: nn.Module, config: PruneConfig, state: dict[str, torch.Tensor], lineage: Lineage
) -> Lineage:
    """Load the weights of the file in ``--weights``; return the lineage with their origin."""
    source = shown(str(config.weights))
    loaded = load_state(network, state, source, replace_head=True)
    for line in loaded.notes:
        say(line)
    if loaded.replaced_head and not config.first_epochs:
        say("the classifier is not trained before the first cut: --base-epochs N trains it")
    return replace(
        lineage,
        base_sha256=digest(state),
        base_weights=source,
        fresh_classifier=loaded.replaced_head,
    )
