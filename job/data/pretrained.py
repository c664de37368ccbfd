"""Preprocessing of pretrained weights, as timm and torchvision declare it. Nothing is downloaded.

To add a package, add an entry to ``SOURCES`` and its name to ``WeightsPackage`` of job.config.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, TypedDict

from job.data.geometry import INTERPOLATIONS, MAX_RESIZE, Resize, parse_channels
from job.data.preprocessing import Preprocessing
from job.errors import UsageError, did_you_mean

# input size -> preprocessing; None is the size that the weights were trained at
BySize = Callable[[int | None], Preprocessing]

TIMM_FITS = {"center": "shorter", "squash": "both", "border": "longer"}
AUGMENTATION = "imagenet"  # the preset closest to both packages' ImageNet recipes


class TimmConfig(TypedDict):
    """How timm prepares the images of a model; ``input_size`` is (C, H, W)."""

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str


@cache
def pretrained(transform: str) -> BySize:
    """Return the preprocessing of ``timm:NAME`` or ``torchvision:WEIGHTS``.

    Raises UsageError for an unknown name, or a package that is not installed.
    """
    package, _, name = transform.partition(":")
    return SOURCES[package](name)


def timm_preprocessing(name: str) -> BySize:
    """Return the preprocessing of the timm model ``name``; raises UsageError."""
    option = f"--transform timm:{name}"
    config = _timm_config(name, option)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise UsageError(
            f"{option} takes inputs of {channels} x {height} x {width}; only square ones of 3 "
            "channels are supported"
        )
    fit, share = TIMM_FITS[config["crop_mode"]], config["crop_pct"]
    interpolation = _interpolation(config["interpolation"], option)
    mean, std = parse_channels(config["mean"]), parse_channels(config["std"], positive=True)

    def by_size(size: int | None) -> Preprocessing:
        side = size or int(height)
        resize = _resize(math.floor(side / share), fit)
        return Preprocessing(AUGMENTATION, side, resize, interpolation, mean, std)

    return by_size


def torchvision_preprocessing(name: str) -> BySize:
    """Return the preprocessing of the torchvision weights ``name``; raises UsageError."""
    option = f"--transform torchvision:{name}"
    transforms = _torchvision_weights(name, option).transforms()
    if type(transforms).__name__ != "ImageClassification" or len(transforms.resize_size) > 1:
        raise UsageError(f"{option} does not belong to an image classification network")
    trained = Preprocessing(
        AUGMENTATION,
        int(transforms.crop_size[0]),
        Resize(int(transforms.resize_size[0])),
        _interpolation(transforms.interpolation.value, option),
        parse_channels(transforms.mean),
        parse_channels(transforms.std, positive=True),
    )
    return lambda size: scaled(trained, size)


SOURCES: dict[str, Callable[[str], BySize]] = {
    "timm": timm_preprocessing,
    "torchvision": torchvision_preprocessing,
}


def scaled(preprocessing: Preprocessing, size: int | None) -> Preprocessing:
    """Scale preprocessing to another input size; the crop keeps its share of the resized image."""
    if size is None or size == preprocessing.size:
        return preprocessing
    resize = preprocessing.resize
    if resize.side:
        resize = _resize(round(size * resize.side / preprocessing.size), resize.fit)
    return replace(preprocessing, size=size, resize=resize)


def check_timm_name(name: str, option: str) -> None:
    """Raise UsageError unless timm has a model ``name``, with or without a tag of weights."""
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"{option} needs the package timm: pip install timm")
    import timm

    if not name or not timm.is_model(name):
        near = did_you_mean(name.partition(".")[0], timm.list_models())
        raise UsageError(
            f"{option}: timm has no model {name!r}{near or '; see timm.list_models()'}"
        )


def _timm_config(name: str, option: str) -> TimmConfig:
    check_timm_name(name, option)
    import timm
    from timm.data.config import resolve_data_config

    architecture = name.partition(".")[0]
    try:
        pretrained_cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tagged = [m for m in timm.list_pretrained() if m.partition(".")[0] == architecture]
        raise UsageError(
            f"{option}: {architecture} has no weights of that name; it has {', '.join(tagged)}"
        ) from error
    assert pretrained_cfg
    config: TimmConfig = resolve_data_config(pretrained_cfg=pretrained_cfg.to_dict())
    return config


def _torchvision_weights(name: str, option: str) -> Any:
    from torchvision.models import get_model_weights, get_weight, list_models

    if name in list_models():
        weights = get_model_weights(name)
        names = ", ".join(f"torchvision:{weights.__name__}.{key}" for key in weights.__members__)
        raise UsageError(f"{option}: name the weights of {name}: {names}")
    try:
        return get_weight(name)
    except (ValueError, KeyError, AttributeError) as error:
        every_weights = {str(w) for model in list_models() for w in get_model_weights(model)}
        near = did_you_mean(name, every_weights) or "; e.g. ResNet50_Weights.IMAGENET1K_V2"
        raise UsageError(f"{option}: torchvision has no weights {name!r}{near}") from error


def _interpolation(name: str, option: str) -> str:
    name = {"nearest-exact": "nearest"}.get(name, name)
    if name not in INTERPOLATIONS:
        raise UsageError(f"{option} interpolates by {name!r}, which is not supported")
    return name


def _resize(side: int, fit: str) -> Resize:
    return Resize(min(MAX_RESIZE, max(1, side)), fit)
