"""Networks by name: the built-in ones, torchvision's, and anybody's ``module:factory``."""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from job.errors import UsageError, did_you_mean, reason
from job.models.cifar import DenseNet40Cifar, ResNet164Cifar, Vgg19Cifar
from job.models.classifier import replace_classifier
from job.models.notes import Note, quiet
from job.models.student import StudentNet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "student": StudentNet,
    "vgg19-cifar": Vgg19Cifar,
    "resnet164-cifar": ResNet164Cifar,
    "densenet40-cifar": DenseNet40Cifar,
}
NAMES = tuple(NETWORKS)
# arguments that torchvision's constructors get unless others are given: the auxiliary classifiers
# serve training from nothing only, and without init_weights a warning is printed
TORCHVISION_ARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
NOMINAL = {
    "student": 256, "vgg19-cifar": 32, "resnet164-cifar": 32, "densenet40-cifar": 32,
    "inception_v3": 299,
}  # fmt: skip
IMAGENET = 224
OWN_OPTIONS = {"num_classes": "--num-classes", "weights": "--weights"}
_named: set[str] = set()  # factories that the user of this process has named


def build_network(
    name: str,
    num_classes: int,
    args: Mapping[str, Any],
    *,
    note: Note = quiet,
    from_card: bool = False,
) -> nn.Module:
    """The network ``name`` with fresh weights and ``num_classes`` logits.

    ``note`` gets a line when the classifier of a ``module:factory`` is replaced. ``from_card``: the
    name stands in a file, which must not make a function of just any package run. Raises UsageError
    for what there is not, or what it does not take.
    """
    for key in sorted(OWN_OPTIONS.keys() & args.keys()):
        raise UsageError(f"--model-arg {key} has its own option: {OWN_OPTIONS[key]}")
    if ":" in name:
        return replace_classifier(_call(name, num_classes, args, from_card), num_classes, note)
    make = NETWORKS.get(name) or _torchvision(name)
    return _made(name, make, {**args, "num_classes": num_classes})


def trust_factory(name: str) -> None:
    """Remember that the user named this ``module:factory``: a model card may name it too."""
    _named.add(name)


def nominal_width(name: str, args: Mapping[str, Any]) -> float:
    """The width of a network before any cut, relative to its base: StudentNet's width_mult."""
    return float(args.get("width_mult", 1)) if name == "student" else 1.0


def nominal_size(name: str) -> int | None:
    """The side in pixels of the images that a network is made for; None for ``module:factory``."""
    return None if ":" in name else NOMINAL.get(name, IMAGENET)


def torchvision_names() -> list[str]:
    """The classification networks of torchvision."""
    import torchvision.models as models

    known: list[str] = models.list_models(module=models)
    return known


def _torchvision(name: str) -> Callable[..., nn.Module]:
    import torchvision.models as models

    known = torchvision_names()
    if name not in known:
        near = did_you_mean(name, [*NAMES, *known])
        raise UsageError(
            f"--model {name!r} is unknown{near}; models: {', '.join(NAMES)}, torchvision's "
            "classification networks (resnet50 and others), or your own as module:factory"
        )

    def make(**args: Any) -> nn.Module:
        network: nn.Module = models.get_model(
            name, weights=None, **{**TORCHVISION_ARGS.get(name, {}), **args}
        )
        return network

    return make


def _made(name: str, make: Callable[..., Any], args: Mapping[str, Any]) -> nn.Module:
    """What ``make`` gives; raises UsageError when it fails or gives no network."""
    try:
        network = make(**args)
    except Exception as error:  # anybody's code, which may raise anything
        given = " ".join(
            f"--model-arg {key}={value}" for key, value in args.items() if key != "num_classes"
        )
        told = f"does not take {given}" if given else "cannot be built"
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        why = f"{kind}{reason(error)}"
        if isinstance(error, TypeError) and "missing" in why and "required" in why:
            why += "; give it by --model-arg NAME=VALUE"
        raise UsageError(f"--model {name} {told}: {why}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"--model {name} returned {type(network).__name__}: it must return a torch.nn.Module"
        )
    return network


def _call(name: str, num_classes: int, args: Mapping[str, Any], from_card: bool) -> nn.Module:
    if not from_card:
        trust_factory(name)
    factory = _imported(name)
    if name not in _named and not _gives_networks(factory):
        raise UsageError(
            f"{name} is a function of an installed package that does not say it returns a network "
            f"(-> nn.Module): if you trust it, name it too, --model {name}"
        )
    try:
        taken = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        taken = {}.values()
    if any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in taken):
        args = {**args, "num_classes": num_classes}
    return _made(name, factory, args)


def _imported(name: str) -> Any:
    """The callable that ``module:factory`` names; raises UsageError that says what is missing."""
    module_name, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise UsageError(f"--model {name!r} is not of the form module:factory, as nets:tiny")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise UsageError(f"--model {name}: {module_name} is a module of Python itself")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs anybody's code
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UsageError(
                f"--model {name}: there is no module {missing}; run from the folder that has it, "
                "or name its folder in PYTHONPATH"
            ) from error
        why = f"{type(error).__name__}: {reason(error)}"
        raise UsageError(f"--model {name}: importing {module_name} fails: {why}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            callables = [n for n, value in vars(found).items() if callable(value)]
            near = did_you_mean(part, callables)
            if module_name == "timm":  # the form that --transform takes
                near = f"; type --model timm:create_model --model-arg model_name={part}"
            raise UsageError(f"--model {name}: no {part} in {module_name}{near}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"--model {name} is a {type(found).__name__}, which cannot be called")
    return found


def _gives_networks(factory: Any) -> bool:
    """Whether a name in a file may lead to calling ``factory`` with arguments of that file.

    It may be a class of networks, a function that says it returns one, or the user's own code: not
    a function that loads or deletes files in some installed package.
    """
    if inspect.isclass(factory):
        return issubclass(factory, nn.Module)
    try:
        returned = typing.get_type_hints(factory).get("return")
        if inspect.isclass(returned) and issubclass(returned, nn.Module):
            return True
        source = inspect.getfile(inspect.unwrap(factory))
    except Exception:  # annotations that name nothing; a callable without a source
        return False
    installed = {"site-packages", "dist-packages"} & set(Path(source).parts)
    return not installed and not source.startswith(sysconfig.get_path("stdlib"))
