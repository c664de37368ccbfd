"""Networks by name: built-in ones, those of torchvision, and the user's as ``module:factory``.

A new built-in network is a class in a module of this folder and an entry in ``NETWORKS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.errors import UsageError, did_you_mean
from job.models.cifar import DenseNet40Cifar, ResNet164Cifar, Vgg19Cifar
from job.models.classifier import replace_classifier
from job.models.custom_network import call_builder, call_factory
from job.models.detectors import DETECTOR_HELP, FROZEN, as_detector, detector_names
from job.models.student import StudentNet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn


@dataclass(frozen=True)
class BuiltInNetwork:
    """Built-in network. ``build`` takes ``num_classes`` and the values of --model-arg."""

    build: Callable[..., nn.Module]
    image_size: int  # side of its images, in pixels
    help: str
    width_arg: str | None = None  # argument that scales its width


NETWORKS = {
    "student": BuiltInNetwork(
        StudentNet, 256, "StudentNet of ML2020's homework 7", width_arg="width_mult"
    ),
    "vgg19-cifar": BuiltInNetwork(Vgg19Cifar, 32, "VGG-19 with BatchNorm, for 32 x 32 images"),
    "resnet164-cifar": BuiltInNetwork(
        ResNet164Cifar, 32, "pre-activation ResNet-164, for 32 x 32 images"
    ),
    "densenet40-cifar": BuiltInNetwork(
        DenseNet40Cifar, 32, "DenseNet-40 of growth 12, for 32 x 32 images"
    ),
}
# Default arguments of torchvision's constructors. Auxiliary classifiers help only in training from
# scratch; torchvision prints a warning if init_weights is missing.
TORCHVISION_ARGS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
TORCHVISION_SIZES = {"inception_v3": 299}  # pixels
TORCHVISION_SIZE = 224  # pixels, for other networks
OPTIONS_BY_ARG = {"num_classes": "--num-classes", "weights": "--weights"}


def build_network(
    name: str,
    num_classes: int,
    args: Mapping[str, Any],
    *,
    from_card: bool = False,
    classifier: bool = True,
    detector: bool = False,
) -> nn.Module:
    """Build the network ``name`` with new weights and ``num_classes`` logits.

    ``from_card`` is true if the name comes from a model card and not from the user. A function of
    an installed package is then called only if it is annotated to return a network. Raises
    UsageError for an unknown name or arguments that the network does not accept.
    """
    more: Any = {"from_card": from_card, "classifier": classifier, "detector": detector}
    return build_with_note(name, num_classes, args, **more)[0]


def build_with_note(
    name: str,
    num_classes: int,
    args: Mapping[str, Any],
    *,
    from_card: bool = False,
    classifier: bool = True,
    detector: bool = False,
) -> tuple[nn.Module, str]:
    """Build a network; returns it and a message if its classifier was replaced, else "".

    Only a ``classifier`` must return logits, and gets a new last layer for other classes. A
    ``detector`` is prepared by ``as_detector``.
    """
    for key in sorted(OPTIONS_BY_ARG.keys() & args.keys()):
        raise UsageError(f"--model-arg {key} has its own option: {OPTIONS_BY_ARG[key]}")
    frozen = detector and bool(args.get(FROZEN))
    args = {key: value for key, value in args.items() if not detector or key != FROZEN}
    if ":" in name:
        network = call_factory(name, num_classes, args, from_card=from_card)
        if detector:
            return as_detector(name, network, frozen), ""
        return network, replace_classifier(network, num_classes) if classifier else ""
    if not num_classes:
        raise UsageError(f"--model {name} needs the number of classes: pass --num-classes")
    if detector:
        build = _detector_builder(name)
        network = call_builder(name, build, {**args, "num_classes": num_classes})
        return as_detector(name, network, frozen), ""
    build = NETWORKS[name].build if name in NETWORKS else _torchvision_builder(name, classifier)
    return call_builder(name, build, {**args, "num_classes": num_classes}), ""


def builtin_name(kind: object) -> str | None:
    """Return the name of the built-in network of class ``kind``; None for other classes."""
    return next((name for name, network in NETWORKS.items() if network.build is kind), None)


def nominal_width(name: str, args: Mapping[str, Any]) -> float:
    """Return the width of a network before any cut: ``width_mult`` of StudentNet, else 1."""
    argument = NETWORKS[name].width_arg if name in NETWORKS else None
    return float(args.get(argument, 1)) if argument else 1.0


def nominal_size(name: str) -> int | None:
    """Return the usual image size of a network, in pixels; None for ``module:factory``."""
    if ":" in name:
        return None
    if name in NETWORKS:
        return NETWORKS[name].image_size
    return TORCHVISION_SIZES.get(name, TORCHVISION_SIZE)


def nominal_classes(name: str) -> int:
    """Return the usual number of classes of a network: that of the homework or of ImageNet."""
    return 11 if name in NETWORKS else 1000


def torchvision_names() -> list[str]:
    """Return the names of the classification networks of torchvision."""
    import torchvision.models as models

    names: list[str] = models.list_models(module=models)
    return names


def segmentation_names() -> list[str]:
    """Return the names of the segmentation networks of torchvision."""
    import torchvision.models as models

    names: list[str] = models.list_models(module=models.segmentation)
    return names


def _torchvision_builder(name: str, classifier: bool) -> Callable[..., nn.Module]:
    import torchvision.models as models

    more = [] if classifier else segmentation_names()
    names = [*torchvision_names(), *more]
    if name not in names:
        near = did_you_mean(name, [*NETWORKS, *names])
        raise UsageError(
            f"--model {name!r} is unknown{near}; models: {', '.join(NETWORKS)}, torchvision's "
            "classification networks (resnet50 and others), those of timm as timm:NAME, "
            "or your own as module:factory"
        )

    # torchvision would download the weights of the backbone
    defaults = {"weights_backbone": None} if name in more else TORCHVISION_ARGS.get(name, {})

    def build(**args: Any) -> nn.Module:
        network: nn.Module = models.get_model(name, weights=None, **{**defaults, **args})
        return network

    return build


def _detector_builder(name: str) -> Callable[..., nn.Module]:
    import torchvision.models as models

    names = detector_names()
    if name not in names:
        raise UsageError(
            f"--model {name!r} is no detector{did_you_mean(name, names)}: --task detection takes "
            f"{DETECTOR_HELP}; torchvision has {', '.join(names)}"
        )

    def build(**args: Any) -> nn.Module:
        network: nn.Module = models.get_model(name, weights=None, weights_backbone=None, **args)
        return network

    return build
