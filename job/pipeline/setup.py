"""What a run needs before it starts: data, base network, a feasible plan."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from job.artifacts.model_card import ModelCard, find_model, load_model
from job.artifacts.provenance import listing_of
from job.console import progress, say
from job.data.dataset import Dataset, hold_out_validation, missing_class_notes
from job.data.folders import CURRENT_LISTING
from job.data.image_check import check_images
from job.data.layout import open_data
from job.data.loader import default_workers
from job.data.preprocessing_options import PreprocessingOptions
from job.data.split_names import SPLIT_NAMES
from job.distributed.collectives import digest, on_main
from job.errors import DataError, InputNotFound, UsageError, shown
from job.files import is_file
from job.models.factory import build_network, nominal_width
from job.models.input_size import check_memory, check_size
from job.models.weights import load_state
from job.models.weights_file import read_state
from job.pipeline.slim_base import own_preprocessing, slim_base, source_folder
from job.pipeline.slim_round import base_of, can_cut, plan_round
from job.processes import local_world_size
from job.slimming.surgery.surgery import apply_plan
from job.training.calibration import Calibration
from job.training.evaluation import Evaluator
from job.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from accelerate import Accelerator
    from torch import nn

    from job.config import PruneConfig
    from job.data.preprocessing import Preprocessing
    from job.distributed.signals import Watch

PLANNED = 10  # rounds of --rounds auto that are shown beforehand
SPLITS = ("training", "validation")  # the testing split never chooses a model


def prepare_data(
    config: PruneConfig, look: Callable[[], None] = lambda: None, output: Path | None = None
) -> tuple[Dataset, Preprocessing]:
    """The data set with its images checked, and how they become inputs; the same on all ranks.

    ``look`` is called between images and may raise. A run in ``output`` is resumed on the files
    that it was begun with, whatever other suffixes are known since. Raises InputNotFound, DataError
    or UsageError.
    """

    def prepare() -> tuple[Dataset, Preprocessing]:
        PreprocessingOptions.of(config).check()
        data = open_data(config.data, listing_of(output) if output else CURRENT_LISTING)
        for split in SPLITS:
            if split in data.splits or split == "training":
                data.labelled(split)
        shown_bar = progress("checking images")

        def bar(results: Iterable[Any], count: int) -> Iterable[Any]:
            for result in shown_bar(results, count):
                look()
                yield result

        present = [split for split in SPLITS if split in data.splits]
        data, largest = check_images(data, present, config.on_bad_image, bar)
        data = hold_out_validation(data, config.seed)
        data = replace(data, notes=(*data.notes, *missing_class_notes(data)))
        own, options = own_preprocessing(config), PreprocessingOptions.of(config)
        return data, options.override(own) if own else options.resolve(largest)

    data, preprocessing = on_main(prepare, interrupt=True)
    check_memory(preprocessing.size)
    say(describe(data, preprocessing))
    return data, preprocessing


def describe(data: Dataset, preprocessing: Preprocessing) -> str:
    """What was recognised, for the console; a line each for notes and skipped pictures."""
    present = [name for name in SPLIT_NAMES if name in data.splits]
    counts = ", ".join(f"{len(data.splits[name]):,} {name}" for name in present)
    place = data.root if data.layout == "built-in" else f"{data.layout} in {data.root}"
    lines = [
        f"data: {place}: {counts}, {len(data.class_names)} classes; {preprocessing.describe()}"
    ]
    lines += [f"data: {note}" for note in data.notes]
    if data.skipped:
        lines.append(f"data: {len(data.skipped)} images cannot be read and are skipped:")
        lines += [f"  {shown(name)}" for name in data.skipped]
    return "\n".join(lines)


def dataset_record(data: Dataset) -> dict[str, Any]:
    """The data set as config.toml names it."""
    record: dict[str, Any] = {"layout": data.layout, "root": data.root, "listing": data.listing}
    if data.layout != "built-in":
        record["path"] = shown(os.path.abspath(data.source))  # noqa: PTH100 (links stay links)
    record |= {name: len(data.splits[name]) for name in SPLITS}
    skipped = [shown(name) for name in data.skipped]
    return record | {"skipped": skipped, "fingerprint": data.fingerprint(SPLITS)}


def base_record(
    config: PruneConfig, card: ModelCard, teacher: nn.Module | None = None
) -> dict[str, Any]:
    """What the base comes from, as config.toml names it: a run is resumed from the same only."""
    record = {
        "weights_sha256": card.lineage.get("base_sha256", ""),
        "epochs": config.first_epochs,
    }
    if teacher:
        record["teacher_sha256"] = digest(teacher.state_dict())
    return record


def teacher_network(config: PruneConfig, card: ModelCard) -> nn.Module | None:
    """The network of ``--teacher`` in eval mode; None where there is no such option.

    Raises InputNotFound, or DataError unless it takes the inputs and has the classes of ``card``.
    """
    if config.teacher is None:
        return None
    name, path = f"--teacher {shown(config.teacher)}", Path(config.teacher)
    if not any(is_file(path / file) for file in ("model.json", "summary.json", "config.toml")):
        raise InputNotFound(f"{name} is not a run, round or model folder")
    network, theirs = load_model(find_model(path))
    if theirs.num_classes != card.num_classes:
        raise DataError(f"{name} has {theirs.num_classes} classes, this run {card.num_classes}")
    if theirs.class_names and card.class_names and theirs.class_names != card.class_names:
        pairs = zip(theirs.class_names, card.class_names, strict=True)
        number, (one, other) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
        raise DataError(f"{name} calls class {number} {shown(one)}, this run {shown(other)}")
    took, given = theirs.preprocessing, card.preprocessing
    if took.inputs != given.inputs:
        raise DataError(
            f"{name} takes other inputs than this run: {took.describe()}, not {given.describe()}; "
            "give --transform, --image-size, --mean, --std and --resize as it has them"
        )
    return network


def base_network(
    config: PruneConfig, data: Dataset, preprocessing: Preprocessing
) -> tuple[nn.Module, ModelCard]:
    """The network that the rounds start from, with its weights if there are any, and its card.

    Raises UsageError, InputNotFound or DataError.
    """
    if folder := source_folder(config):
        return slim_base(config, folder, data, preprocessing)
    num_classes = config.num_classes or len(data.class_names)
    if num_classes < len(data.class_names):
        raise UsageError(
            f"--num-classes {num_classes} is less than the {len(data.class_names)} of the data"
        )
    torch.manual_seed(config.seed)
    network = build_network(config.model, num_classes, config.args, note=say)
    check_size(network, preprocessing.size)
    lineage: dict[str, Any] = {"seed": config.seed, "listing": data.listing}
    if config.weights:
        state, source = read_state(str(config.weights)), shown(config.weights)
        fresh = load_state(network, state, source, replace_head=True, note=say)
        lineage |= {"fresh_classifier": True} if fresh else {}
        if fresh and not config.first_epochs:
            say("the classifier is not trained before the first cut: --base-epochs N would do that")
        lineage |= {"base_weights": shown(config.weights), "base_sha256": digest(state)}
    unnamed = (str(number) for number in range(len(data.class_names), num_classes))
    card = ModelCard(
        model=config.model,
        args=config.args,
        num_classes=num_classes,
        preprocessing=preprocessing,
        class_names=(*data.class_names, *unnamed),
        width=nominal_width(config.model, config.args),
        lineage=lineage,
    )
    return network, replace(card, base=base_of(network, card))


def training_tools(
    config: PruneConfig,
    data: Dataset,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    least: int,
    watch: Watch,
) -> tuple[Evaluator, Trainer, Calibration]:
    """What evaluates, trains and calibrates the network of every round, with their loaders.

    A global batch has ``least`` images or more.
    """
    workers = config.workers
    if workers is None:
        workers = default_workers(local_world_size(), accelerator.device.type == "cuda")
    shared = (preprocessing, accelerator, workers)
    classes = config.num_classes or len(data.class_names)
    evaluator = Evaluator(data.splits["validation"], classes, *shared)
    training = data.splits["training"]
    trainer = Trainer(training, evaluator, config, *shared, least)
    return evaluator, trainer, Calibration(training, *shared, config.seed, watch)


def planned_rounds(
    config: PruneConfig, network: nn.Module, card: ModelCard
) -> list[dict[str, Any]]:
    """Width and cost of the base and of every round; raises UsageError for what is out of reach.

    Of ``--rounds auto`` the first PLANNED, if as many can be cut. Exact for the uniform policy and
    for the metric of a target; else a forecast, by γ as it is.
    """
    assert card.base
    assert card.base.cost
    entries = [{"round": 0, "width": card.width, **card.base.cost.to_dict()}]
    last = config.last_round
    for round_ in range(1, (PLANNED if last is None else last) + 1):
        if last is None and round_ > 1 and not can_cut(config, network, card, round_):
            break
        plan = plan_round(config, network, card, round_)
        assert plan.after
        network, card = apply_plan(network, plan.layers), card.cut(plan.layers, plan.width)
        entries.append({"round": round_, "width": card.width, **plan.after.to_dict()})
    return entries


GENERIC = ("create", "create_model", "build", "build_model", "get_model", "make_model", "model")


def default_output(config: PruneConfig) -> Path:
    """``runs/MODEL-DATA``: the same name for the same command, so that it resumes itself."""
    return Path("runs") / default_name(config)


def default_name(config: PruneConfig) -> str:
    """MODEL with its arguments, and DATA: ``timm-resnet18-photos`` for timm:create_model."""
    module, _, factory = config.model.partition(":")
    texts = [value for _, value in config.model_arg if isinstance(value, str)]
    rest = [f"{k}={json.dumps(v)}" for k, v in config.model_arg if not isinstance(v, str)]
    parts = [module, "" if texts and factory in GENERIC else factory, *texts, *rest]
    data = os.path.basename(os.path.abspath(config.data)) if config.data else "fashion-mnist"  # noqa: PTH100, PTH119
    name = re.sub(r"[^\w.=+-]+", "-", "-".join(part for part in parts if part))
    return f"{name[:120]}-{data}" if data else name[:120]
