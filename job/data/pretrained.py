"""The preprocessing that timm and torchvision state for their weights; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from job.data.geometry import INTERPOLATIONS, MAX_RESIZE, Resize, parse_channels
from job.data.preprocessing import Preprocessing
from job.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCES = ("timm", "torchvision")
TIMM_FITS = {"center": "shorter", "squash": "both", "border": "longer"}
# training augments as both packages' own recipes for ImageNet do
PRESET = "imagenet"


@cache
def pretrained(transform: str) -> Callable[[int | None], Preprocessing]:
    """What ``timm:NAME`` or ``torchvision:WEIGHTS`` gives at a size, or by default at its own.

    Raises UsageError for what is not known, or not installed.
    """
    package, _, name = transform.partition(":")
    return {"timm": _timm, "torchvision": _torchvision}[package](name)


def _timm(name: str) -> Callable[[int | None], Preprocessing]:
    option = f"--transform timm:{name}"
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"{option} needs the package timm: pip install timm")
    import timm
    from timm.data.config import resolve_data_config

    if not name or not timm.is_model(name):
        plain = name.partition(".")[0]
        near = did_you_mean(plain, timm.list_models()) or "; see timm.list_models()"
        raise UsageError(f"{option}: timm has no model {name!r}{near}")
    try:
        stated = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        plain = name.partition(".")[0]
        tagged = [m for m in timm.list_pretrained() if m.partition(".")[0] == plain]
        raise UsageError(
            f"{option}: {plain} has no weights of that name; it has {', '.join(tagged)}"
        ) from error
    assert stated
    config = resolve_data_config(pretrained_cfg=stated.to_dict())
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise UsageError(
            f"{option} takes inputs of {channels} x {height} x {width}; only square ones of 3 "
            "channels are supported"
        )
    own = Preprocessing(
        PRESET,
        int(height),
        Resize(1, TIMM_FITS[config["crop_mode"]]),
        _interpolation(option, config["interpolation"]),
        parse_channels(config["mean"]),
        parse_channels(config["std"], positive=True),
    )
    share = config["crop_pct"]

    def at(size: int | None) -> Preprocessing:
        side = size or own.size
        return replace(own, size=side, resize=_resize(math.floor(side / share), own.resizing.fit))

    return at


def _torchvision(name: str) -> Callable[[int | None], Preprocessing]:
    option = f"--transform torchvision:{name}"
    weights = _weights(option, name).transforms()
    if type(weights).__name__ != "ImageClassification" or len(weights.resize_size) > 1:
        raise UsageError(f"{option} is not of a network that classifies images")
    own = Preprocessing(
        PRESET,
        int(weights.crop_size[0]),
        Resize(int(weights.resize_size[0])),
        _interpolation(option, weights.interpolation.value),
        parse_channels(weights.mean),
        parse_channels(weights.std, positive=True),
    )
    return lambda size: scaled(own, size)


def _weights(option: str, name: str) -> Any:
    from torchvision.models import get_model_weights, get_weight, list_models

    if name in list_models():
        kinds = get_model_weights(name)
        names = ", ".join(
            f"torchvision:{kind.__name__}.{key}" for kind in (kinds,) for key in kinds.__members__
        )
        raise UsageError(f"{option}: name the weights of {name}: {names}")
    try:
        return get_weight(name)
    except (ValueError, KeyError, AttributeError) as error:
        known = {str(w) for model in list_models() for w in get_model_weights(model)}
        near = did_you_mean(name, known) or "; e.g. ResNet50_Weights.IMAGENET1K_V2"
        raise UsageError(f"{option}: torchvision has no weights {name!r}{near}") from error


def _interpolation(option: str, name: str) -> str:
    name = {"nearest-exact": "nearest"}.get(name, name)
    if name not in INTERPOLATIONS:
        raise UsageError(f"{option} interpolates by {name!r}, which is not supported")
    return name


def scaled(own: Preprocessing, size: int | None) -> Preprocessing:
    """``own`` at another size, the crop the same share of the resized image."""
    if size is None or size == own.size:
        return own
    if not own.resizing.side:
        return replace(own, size=size)
    side = round(size * own.resizing.side / own.size)
    return replace(own, size=size, resize=_resize(side, own.resizing.fit))


def _resize(side: int, fit: str) -> Resize:
    return Resize(min(MAX_RESIZE, max(1, side)), fit)
