"""Models on disk: ``model.safetensors`` and ``model.json``, which are all that loading needs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping  # noqa: TC003  (from_json reads the types)
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from job.artifacts.json_records import from_json, to_json
from job.artifacts.records import Lineage
from job.artifacts.tensor_file import write_tensors
from job.artifacts.versions import package_versions
from job.config import CLASSIFICATION, DETECTION, LOGIT_TASKS
from job.console import counted
from job.data.preprocessing import Preprocessing  # noqa: TC001
from job.errors import DataError, GammaslimError, InputNotFound, UsageError, shown, writing
from job.files import is_file, new_directory, read_json
from job.models.detectors import fit_to_card
from job.models.factory import build_network
from job.models.input_size import MAX_SIZE
from job.models.weights import load_state
from job.models.weights_file import read_state
from job.slimming.planning.base import Base  # noqa: TC001
from job.slimming.planning.layer_channels import Layers, compose
from job.slimming.surgery.surgery import apply_plan
from job.training.epoch import BRIEF

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
REQUIRED = ("class_names", "width", "layers", "metrics", "lineage")  # present in every model.json
RECOMMENDED = r"rounds/[0-9]{2,4}"  # as a summary names its model


@dataclass(frozen=True)
class ModelCard:
    """Description of a network without its weights: the fields of model.json, in order.

    ``layers`` holds the kept channels, as indices into the network that ``model`` builds.
    ``widths`` holds the number of outputs of each layer, ``versions`` those of the packages, and
    ``metrics`` scores by name. Fractions are relative to ``base``. ``task`` is the value of --task;
    without classes, ``num_classes`` is 0.
    """

    WRITE_DEFAULTS: ClassVar[bool] = True

    model: str
    args: Mapping[str, Any]
    num_classes: int
    _: KW_ONLY
    class_names: tuple[str, ...] = ()
    width: float = 1.0
    layers: Layers = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    preprocessing: Preprocessing = field(metadata={"key": "input"})
    metrics: Mapping[str, object] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    base: Base | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    task: str = field(default=CLASSIFICATION, metadata=BRIEF)

    def __post_init__(self) -> None:
        """Raise DataError for values that are impossible for a network."""
        least = 1 if self.is_classifier else 0
        if self.num_classes < least or len(self.class_names) not in (0, self.num_classes):
            names = counted(len(self.class_names), "class name")
            raise DataError(f"{names} for {counted(self.num_classes, 'class')}")
        if not (math.isfinite(self.width) and self.width > 0):
            raise DataError(f"a width of {self.width}")
        if self.preprocessing.size > MAX_SIZE:
            raise DataError(f"inputs of {self.preprocessing.size} pixels")

    @property
    def is_classifier(self) -> bool:
        """Whether the network is trained for classification."""
        return self.task == CLASSIFICATION

    def build(self) -> nn.Module:
        """Build the network of this card with new weights; torch's random state is not changed.

        The module of a ``module:factory`` must be importable. Raises UsageError.
        """
        with torch.random.fork_rng(devices=[]):
            base = build_network(
                self.model,
                self.num_classes,
                self.args,
                from_card=True,
                classifier=self.task in LOGIT_TASKS,
                detector=self.task == DETECTION,
            )
        if self.task == DETECTION:
            fit_to_card(base, self.preprocessing)
        return apply_plan(base, self.layers)

    def cut(self, layers: Layers, width: float) -> ModelCard:
        """Return the card after a cut to ``layers``, indices into the network of this card."""
        return replace(self, layers=compose(self.layers, layers), width=width)


def save_model(
    folder: Path,
    network: nn.Module,
    card: ModelCard,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the two files of a model into ``folder``, all or none; raises StorageError.

    ``texts`` are further files, by name.
    """
    state = unshare_tensors(network.state_dict())
    widths = {key[:-7]: len(value) for key, value in state.items() if key.endswith(".weight")}
    card = replace(card, widths=widths, versions=package_versions())
    content = {"format": FORMAT, **to_json(card)}
    with new_directory(folder) as temporary, writing(folder):
        write_tensors(temporary / "model.safetensors", state, {"format": "pt"})
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        (temporary / "model.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, "utf-8")


def unshare_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state on the CPU with a copy of each shared tensor, as safetensors requires."""
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors


def load_model(folder: Path) -> tuple[nn.Module, ModelCard]:
    """Load a network in eval mode, with its card.

    Raises InputNotFound, DataError, or UsageError for one saved in Python without what builds it.
    """
    card = read_card(folder)
    if not card.model:
        raise UsageError(
            f"{shown(folder)} was saved without the builder of its network: load it in Python with "
            "load(path, network=…), or save it with model='module:factory'"
        )
    try:
        network = card.build()
    except (GammaslimError, IndexError, AttributeError, RuntimeError) as error:
        raise DataError(f"{shown(folder / 'model.json')} describes no network: {error}") from error
    load_weights(network, folder)
    return network.eval(), card


def load_weights(network: nn.Module, folder: Path) -> None:
    """Load the weights in ``folder``; raises InputNotFound, or DataError for another network's."""
    weights = folder / "model.safetensors"
    load_state(network, read_state(weights), shown(weights))


def read_card(folder: Path) -> ModelCard:
    """Read the card in ``folder``/model.json; raises InputNotFound or DataError."""
    path = folder / "model.json"
    if not is_file(path):
        raise InputNotFound(f"{shown(path)} does not exist")
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise DataError(f"format {content['format']} is not {FORMAT}; use a newer gammaslim")
        for key in REQUIRED:
            content[key]
        return from_json(ModelCard, content)
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{shown(path)} is not a model card: {reason}") from error


def find_model(path: str | Path) -> Path:
    """Return the model folder that ``path`` means: itself, or the recommended model of a run.

    Raises InputNotFound or DataError.
    """
    folder = Path(path)
    if is_file(folder / "model.json"):
        return folder
    summary = folder / "summary.json"
    if not is_file(summary) and is_file(folder / "config.toml"):
        raise InputNotFound(
            f"{shown(path)} is a run whose base is not finished, so it has no model yet: "
            "run its prune command again to resume it"
        )
    if not is_file(summary):
        raise InputNotFound(
            f"{shown(path)} is not a model: expected a run folder (summary.json), "
            "a model folder (model.json), or a weights file with --model"
        )
    try:
        recommended = read_json(summary)["recommended"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{shown(summary)} names no recommended model: {error}") from error
    if not (isinstance(recommended, str) and re.fullmatch(RECOMMENDED, recommended)):
        raise DataError(f"{shown(summary)} recommends {recommended!r}, which is not rounds/NN")
    return folder / recommended
