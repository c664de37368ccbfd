"""The networks that the tools of peer.py cut: those of public libraries and of the tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from transformers_networks import transformers_network

from support import dense_networks, shapes
from support import networks as small_networks
from support.detectors import one_stage, two_stage

LIST = Path(__file__).with_suffix(".txt")
CLASSES = 10
SMALL: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in small_networks.CUTTABLE},
    **{kind.__name__: kind for kind in small_networks.LEFT_ALONE},
    "YOLOv5": partial(dense_networks.Yolo, dense_networks.C3),
    "YOLOv8": dense_networks.Yolo,
    "YOLO11": partial(dense_networks.Yolo, dense_networks.C3k2),
    "HighResolution": dense_networks.HighResolution,
    "TwoPaths": dense_networks.TwoPaths,
    "UNet": dense_networks.UNet,
    "ShapesUNet": partial(shapes.rgb_unet, 4),
}


@dataclass(frozen=True)
class Listed:
    """A line of the list: name, height and width of the images, whether it is built for them."""

    name: str
    height: int
    width: int
    built_for_size: bool = False

    def at_least(self, size: int) -> Listed:
        """Return the line with images of ``size`` pixels, where these were smaller."""
        return replace(self, height=max(self.height, size), width=max(self.width, size))


@dataclass(frozen=True)
class Case:
    """A network in eval mode with random weights, an example (1, 3, H, W), and what it runs.

    ``forward`` is a function ``forward(network, images)`` of the layers of a detector, or None.
    """

    network: nn.Module
    example: torch.Tensor
    forward: Callable[..., Any] | None

    def run(self, network: nn.Module, images: torch.Tensor) -> Any:
        """Return the outputs of ``network``, or those of its layers if it is a detector."""
        return self.forward(network, images) if self.forward else network(images)


def listed() -> list[Listed]:
    """Read the list, in the order in which the networks are cut."""
    rows = []
    for line in LIST.read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        name, size, *options = line.split()
        height, _, width = size.partition("x")
        rows.append(Listed(name, int(height), int(width or height), "img_size" in options))
    return rows


def build(entry: Listed) -> Case:
    """Build a network of the list; the same weights each time."""
    torch.manual_seed(0)
    source, _, name = entry.name.partition("/")
    network, forward = BUILDERS[source](name, entry)
    example = torch.rand(1, 3, entry.height, entry.width)
    return Case(randomise(network.eval()), example, forward)


def _torchvision(name: str, entry: Listed) -> tuple[nn.Module, Any]:
    del entry
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    options |= {"weights_backbone": None} if "weights_backbone" in _names(builder) else {}
    options |= {"init_weights": False} if "init_weights" in _names(builder, deep=True) else {}
    network = builder(num_classes=CLASSES, **options)
    if not isinstance(getattr(network, "transform", None), nn.Module):
        return network, None
    return network, two_stage if hasattr(network, "roi_heads") else one_stage


def _names(builder: Any, *, deep: bool = False) -> set[str]:
    names = set(inspect.signature(builder).parameters)
    return names | {"init_weights"} if deep and builder.__name__ in WITH_INIT_WEIGHTS else names


WITH_INIT_WEIGHTS = ("googlenet", "inception_v3")  # seconds of draws of a truncated normal


def _timm(name: str, entry: Listed) -> tuple[nn.Module, Any]:
    options = {"img_size": entry.height} if entry.built_for_size else {}
    return timm.create_model(name, num_classes=CLASSES, **options), None


def _tests(name: str, entry: Listed) -> tuple[nn.Module, Any]:
    del entry
    return SMALL[name](), None


def _pytorchcv(name: str, entry: Listed) -> tuple[nn.Module, Any]:
    del entry
    from pytorchcv.model_provider import get_model

    return get_model(name), None


def _segmentation(name: str, entry: Listed) -> tuple[nn.Module, Any]:
    """Build a network of segmentation-models-pytorch, named ``ARCHITECTURE:ENCODER``."""
    del entry
    import segmentation_models_pytorch as smp

    architecture, _, encoder = name.partition(":")
    network = smp.create_model(architecture, encoder, encoder_weights=None, classes=CLASSES)
    return network, None


def _transformers(name: str, entry: Listed) -> tuple[nn.Module, Any]:
    del entry
    return transformers_network(name, CLASSES), None


def _ultralytics(name: str, entry: Listed) -> tuple[nn.Module, Any]:
    del entry
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", nc=CLASSES, verbose=False), None


BUILDERS = {
    "torchvision": _torchvision, "timm": _timm, "tests": _tests, "pytorchcv": _pytorchcv,
    "smp": _segmentation, "transformers": _transformers, "ultralytics": _ultralytics,
}  # fmt: skip


def randomise(network: nn.Module) -> nn.Module:
    """Give statistics and constant weights random values, as after some training.

    Constants hide what a cut does: a branch whose last weights are zero has no effect, and equal
    channels may be exchanged.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in network.modules():
            mean, variance = getattr(layer, "running_mean", None), getattr(layer, "running_var", 0)
            if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
                mean.copy_(0.2 * torch.randn(mean.shape, generator=generator))
                variance.copy_(0.5 + torch.rand(variance.shape, generator=generator))
        for weight in network.parameters():
            if weight.numel() and (weight == weight.flatten()[0]).all():
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return network
