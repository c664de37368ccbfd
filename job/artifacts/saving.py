"""``save`` and ``load``: networks as folders of weights and a card, without any pickle."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from job.artifacts.model_card import (
    ModelCard,
    find_model,
    load_model,
    load_weights,
    read_card,
    save_model,
)
from job.artifacts.stored_copy import local_path
from job.data.preprocessing_options import PreprocessingOptions
from job.errors import DataError, GammaslimError, OutputError, UsageError, shown
from job.files import check_writable, is_file
from job.models.classifier import find_head
from job.models.custom_network import trust_factory
from job.models.factory import builtin_name, torchvision_names
from job.slimming.arguments import check_network
from job.slimming.graph.modes import training_mode
from job.slimming.graph.trace import trace_network
from job.slimming.inputs import call_network, kind_of, move_like, tensors_in
from job.slimming.planning.base import Base, layer_widths
from job.slimming.planning.layer_channels import compose
from job.slimming.planning.plan import Plan
from job.slimming.surgery.comparison import relative_difference
from job.slimming.surgery.probe import probe_batch
from job.slimming.surgery.surgery import apply_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from job.slimming.planning.layer_channels import Layers

DEFAULT_SIZE = 224  # pixels of a network's images where nothing else is known
SAME = 1e-5  # relative difference of outputs: devices round differently


def save(
    network: nn.Module,
    path: str | Path,
    *,
    plan: Plan | Sequence[Plan] | None = None,
    model: Any = None,
    model_args: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    image_size: int | None = None,
) -> None:
    """Write ``network`` into a new folder ``path``: model.safetensors and model.json.

    ``plan`` is the plan of the cut that made the network, or the plans of several cuts in order.

    ``model`` builds the network before any cut: a name as for ``gammaslim prune --model``, or an
    importable class or function, itself or as "module:factory". ``model_args`` holds its keyword
    arguments. ``load(path)`` then returns the same network, which is checked now, and the commands
    take the folder. Without ``model``, the builder is found for networks of torchvision and of this
    package, and for importable classes that need no arguments. For other networks a line is logged,
    and ``load`` needs the network before any cut: ``load(path, network=Net())``.

    ``class_names`` and ``image_size`` serve the commands. By default the size is that of the plan's
    example.

    Raises UsageError if ``plan`` or ``model`` belongs to another network, OutputError if ``path``
    already exists.

    >>> import torch, torchvision
    >>> import job
    >>> wide = torchvision.models.resnet18(num_classes=10)
    >>> narrow, plan = job.slim(wide, torch.rand(1, 3, 64, 64))
    >>> job.save(narrow, "slim", plan=plan)  # doctest: +SKIP
    >>> narrow = job.load("slim")  # doctest: +SKIP
    """
    check_network(network)
    plans = [plan] if isinstance(plan, Plan) else list(plan or ())
    if not all(isinstance(each, Plan) for each in plans):
        raise UsageError(
            f"plan must be what slim returned next to the network; got {kind_of(plan)}"
        )
    folder = _free_folder(path)
    layers: Layers = {}
    for each in plans:
        layers = compose(layers, each.layers)
    example = plans[-1].example if plans else None
    classes = len(class_names) or _count_logits(network, example)
    card = ModelCard(
        "", {}, classes, preprocessing=_default_preprocessing(example, image_size),
        class_names=tuple(class_names), layers=layers, width=plans[-1].width if plans else 1.0,
    )  # fmt: skip
    made = _card_with_model(network, card, model, model_args or {}, example)
    if made is None:
        logging.getLogger("gammaslim").info(
            "%s is saved without its builder: load it with load(path, network=…)", shown(folder)
        )
    save_model(folder, network, made or card)


def load(path: str | Path, *, network: nn.Module | None = None) -> nn.Module:
    """Load the network saved at ``path`` (a run, a round or a model folder), in eval mode.

    ``path`` may be in an object store, e.g. s3://bucket/runs/a. ``network`` is the network before
    any cut, with any weights. It is needed if ``save`` did not know how to build it, and is not
    changed. No pickle is executed. Raises InputNotFound, DataError for damaged files, or UsageError
    if a network is needed.

    >>> network = job.load("runs/student-fashion-mnist")  # doctest: +SKIP
    >>> logits = network(torch.rand(1, 3, 32, 32))  # doctest: +SKIP
    """
    _check_path(path)
    path = local_path(str(path), weights=True)
    if is_file(Path(path)):
        raise UsageError(
            f"path must be a folder; {shown(path)} is a file: give the weights in it to the "
            "load_state_dict of the network they were saved from"
        )
    folder = find_model(path)
    if network is None:
        return load_model(folder)[0]
    check_network(network)
    try:
        narrow = apply_plan(network, read_card(folder).layers)
    except (GammaslimError, IndexError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{shown(path)} was cut from another network than the {type(network).__name__} given: "
            f"{error}"
        ) from error
    load_weights(narrow, folder)
    return narrow.eval()


def _check_path(path: Any) -> None:
    if not isinstance(path, (str, Path)) or not str(path):
        raise UsageError(f"path must be a folder; got {kind_of(path)}")


def _free_folder(path: Any) -> Path:
    _check_path(path)
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{shown(path)} already exists; choose another path")
    check_writable(folder)
    return folder


def _count_logits(network: nn.Module, example: Any) -> int:
    """Return the number of logits; 1 for other outputs."""
    if example is None:
        try:
            return find_head(network)[1]
        except UsageError:
            return 1
    outputs = trace_network(network, example).outputs
    return int(outputs[0].shape[1]) if len(outputs) == 1 and outputs[0].dim() == 2 else 1


def _default_preprocessing(example: Any, size: int | None) -> Any:
    images = isinstance(example, torch.Tensor) and example.dim() == 4
    size = size or (min(example.shape[2:]) if images else DEFAULT_SIZE)
    return PreprocessingOptions(image_size=size).resolve(size)


def _card_with_model(
    network: nn.Module, card: ModelCard, model: Any, args: Mapping[str, Any], example: Any
) -> ModelCard | None:
    """Return the card with the verified name of the network's builder; None if unknown.

    Raises UsageError for a ``model`` that builds another network.
    """
    if model is not None:
        name = _name_of(model)
        trust_factory(name)
        if args.get("num_classes") == card.num_classes:  # the card has that already
            args = {key: value for key, value in args.items() if key != "num_classes"}
        made = replace(card, model=name, args=args)
        if why := _mismatch(network, made, example):
            raise UsageError(
                f"model {name} does not give this network: {why}; without a model, load takes the "
                "network: load(path, network=…)"
            )
        return _with_base(made)
    # only outputs tell networks with the same weights apart
    guesses = [] if example is None else _guesses(type(network))
    for made in (replace(card, model=name) for name in guesses):
        if _mismatch(network, made, example) is None:
            return _with_base(made)
    return None


def _with_base(card: ModelCard) -> ModelCard:
    return replace(card, base=Base(layer_widths(replace(card, layers={}).build()), None))


def _name_of(model: Any) -> str:
    if isinstance(model, str):
        return model
    if not callable(model):
        raise UsageError(f"model must be a name, or what builds the network; got {kind_of(model)}")
    if builtin := builtin_name(model):
        return builtin
    name = getattr(model, "__name__", "")
    if name in torchvision_names() and str(model.__module__).startswith("torchvision.models"):
        return str(name)
    path = f"{model.__module__}:{getattr(model, '__qualname__', name)}"
    if "<" in path or path.startswith("__main__:"):
        raise UsageError(
            f"model {name or kind_of(model)} cannot be imported by its name: put it into a module, "
            "or leave model out and give load the network"
        )
    return path


def _guesses(kind: type) -> list[str]:
    """Return names of builders that may have built a network of this class."""
    builtin = builtin_name(kind)
    if kind.__module__.startswith("torchvision.models"):
        import torchvision

        return [
            name
            for name in torchvision_names()
            if torchvision.models.get_model_builder(name).__module__ == kind.__module__
        ]
    foreign = kind.__module__.partition(".")[0] in ("torch", "__main__", "builtins")
    if builtin or foreign or "<" in kind.__qualname__:
        return [builtin] if builtin else []
    needed = [
        p
        for p in list(inspect.signature(kind).parameters.values())
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return [] if needed else [f"{kind.__module__}:{kind.__qualname__}"]


def _mismatch(network: nn.Module, card: ModelCard, example: Any) -> str | None:
    """Return why ``card`` does not describe ``network``, or None if it does."""
    try:
        other = card.build()
    except (GammaslimError, IndexError, AttributeError, RuntimeError) as error:
        return str(error)
    state = network.state_dict()
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    for key, value in state.items():
        if shapes.get(key) != value.shape:
            there = tuple(shapes[key]) if key in shapes else "nothing"
            return f"{key} is {tuple(value.shape)}, not {there}; is the plan missing?"
    if len(shapes) > len(state):
        return f"it has no {next(key for key in shapes if key not in state)}"
    if example is None:
        return None
    other.load_state_dict(state)
    weight = next(iter(network.parameters()))
    noise = move_like(probe_batch(example), weight)
    outputs = []
    for each in (network, other.to(weight.device, weight.dtype)):
        with training_mode(each, training=False), torch.no_grad():
            outputs.append(list(tensors_in(call_network(each, noise))))
    return None if relative_difference(*outputs) <= SAME else "the outputs differ"
