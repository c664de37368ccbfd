"""``--weights`` of a run, a round or a model folder: a slim model is the base of a new run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.artifacts.model_card import ModelCard, find_model, load_model, read_card
from job.artifacts.provenance import own_data
from job.config import PruneConfig
from job.console import say
from job.data.layout import BUILT_IN
from job.distributed.collectives import digest
from job.errors import DataError, UsageError, shown
from job.pipeline.slim_round import base_of
from job.slimming.planning.base import layer_widths

if TYPE_CHECKING:
    from torch import nn

    from job.data.dataset import Dataset
    from job.data.preprocessing import Preprocessing

DEFAULTS = PruneConfig()


def source_folder(config: PruneConfig) -> Path | None:
    """The model folder that ``--weights`` means; None where it is a file or is not given.

    Raises InputNotFound or DataError for a folder without a model.
    """
    if not config.weights or not Path(config.weights).is_dir():
        return None
    return find_model(config.weights)


def adopted(config: PruneConfig) -> PruneConfig:
    """``config`` with the network, and without ``--data`` the data, of its slim base, if any.

    Raises UsageError where an option contradicts it or the data are not known, InputNotFound or
    DataError.
    """
    folder = source_folder(config)
    if folder is None:
        return config
    card, name = read_card(folder), f"--weights {shown(str(config.weights))}"
    what = f"{card.model} with {card.num_classes} logits"
    for option, given, default, own in (
        ("--model", config.model, DEFAULTS.model, card.model),
        ("--model-arg", config.args, DEFAULTS.args, card.args),
        ("--num-classes", config.num_classes, DEFAULTS.num_classes, card.num_classes),
    ):
        if given not in (default, own):
            raise UsageError(f"{name} brings its own network, {what}: leave out {option}")
    data = config.data
    if data is None:
        own = own_data(str(config.weights), card.lineage)
        say(f"data: {shown(own)}, that of {shown(folder)}")
        data = None if own == BUILT_IN else own
    own_args = tuple(card.args.items())
    return replace(
        config, model=card.model, model_arg=own_args, num_classes=card.num_classes, data=data
    )


def own_preprocessing(config: PruneConfig) -> Preprocessing | None:
    """That of the slim base, which options override; None where there is no such base."""
    folder = source_folder(config)
    return read_card(folder).preprocessing if folder else None


def slim_base(
    config: PruneConfig, folder: Path, data: Dataset, preprocessing: Preprocessing
) -> tuple[nn.Module, ModelCard]:
    """The slim network and its card as the base of a new run: fractions are of it.

    Its ``layers`` stay indices into the network as it was built. Raises DataError for other
    classes than those of ``data``.
    """
    network, card = load_model(folder)
    check_classes(f"--weights {shown(str(config.weights))}", card, data.class_names)
    sha = digest(network.state_dict())
    lineage: dict[str, Any] = {
        "seed": config.seed, "listing": data.listing, "base_weights": shown(folder),
        "base_sha256": sha, "from": card.lineage,
    }  # fmt: skip
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


def check_classes(name: str, theirs: ModelCard, ours: tuple[str, ...] | list[str]) -> None:
    """Raise DataError unless the model called ``name`` has the classes ``ours``, and their names.

    Of a model without class names only the number counts.
    """
    if theirs.num_classes < len(ours):
        raise DataError(f"{name} has {theirs.num_classes} classes, the data {len(ours)}")
    for number, (one, other) in enumerate(zip(theirs.class_names, ours, strict=False)):
        if one != other:
            raise DataError(
                f"{name} calls class {number} {shown(one)}, the data {shown(other)}: give the "
                "--data it was trained on"
            )
