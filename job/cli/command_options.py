"""Options of the commands next to ``prune``. Those that it has too are declared by its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from job.config import (
    BadImageMode,
    CompensationName,
    DeviceName,
    ImportanceName,
    PolicyName,
    PrecisionName,
    PreprocessingConfig,
    PruneConfig,
)
from job.options import option, shared


@dataclass(frozen=True)
class ModelOptions(PreprocessingConfig):
    """How to read MODEL. A run, round or model folder needs nothing but its path."""

    path: str
    model: str | None = shared(
        PruneConfig,
        "model",
        default=None,
        help="The network of a weights file: student, vgg19-cifar, resnet164-cifar, "
        "densenet40-cifar, a torchvision classification model, or your own as module:factory.",
    )
    model_arg: tuple[tuple[str, int | float | bool | str], ...] = shared(PruneConfig, "model_arg")
    num_classes: int | None = shared(PruneConfig, "num_classes", default_text="that of the weights")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Which images to use, and where to run."""

    data: str | None
    on_bad_image: BadImageMode = shared(PruneConfig, "on_bad_image")
    device: DeviceName = shared(PruneConfig, "device")
    precision: PrecisionName = shared(PruneConfig, "precision")
    workers: int | None = shared(PruneConfig, "workers")


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(ImageOptions):
    """Which split to run MODEL over."""

    split: str | None
    seed: int | None = shared(
        PruneConfig,
        "seed",
        default=None,
        help="Seed that holds out a validation split.",
        default_text="that of MODEL's run",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoringOptions):
    """Options of ``evaluate``."""

    data: str | None = shared(
        PruneConfig,
        "data",
        help="Labelled images in any form that prune takes.",
        default_text="the data of MODEL's run",
    )
    split: str | None = option(
        None,
        "Split to evaluate. train, val, dev, test and eval are understood too.",
        default_text="validation",
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ScoringOptions):
    """Options of ``predict``."""

    data: str | None = shared(
        PruneConfig,
        "data",
        help="Data set, folder of images, or one image.",
        default_text="the data of MODEL's run",
    )
    split: str | None = option(
        None,
        "Split to predict. train, val, dev, test and eval are understood too.",
        default_text="testing, or all images if there are no splits",
    )
    format: Literal["auto", "csv", "kaggle"] = option(
        "auto",
        "Columns: file,class,probability (csv) or Id,Category (kaggle). auto: kaggle if the split "
        "has numbered files, else csv.",
    )


@dataclass(frozen=True, kw_only=True)
class SlimOptions(ImageOptions):
    """Options of ``slim``. None: the best that the inputs allow."""

    data: str | None = shared(
        PruneConfig,
        "data",
        help="Images to calibrate the cut with. If they have labels, accuracy is measured too.",
        default_text=None,
    )
    target: str = shared(
        PruneConfig,
        "target",
        default="channels=0.5",
        help="What is left: width, channels, params, macs or bytes, as a fraction of MODEL's base "
        "(at most 1) or a number.",
        default_text=None,
    )
    policy: PolicyName | None = shared(
        PruneConfig, "policy", default=None, default_text="uniform for a width, else global"
    )
    importance: ImportanceName | None = shared(
        PruneConfig, "importance", default=None, default_text="refit with --data, else gamma"
    )
    compensate: CompensationName | None = shared(
        PruneConfig, "compensate", default=None, default_text="regress with --data, else none"
    )
    recalibrate: int = shared(
        PruneConfig,
        "recalibrate",
        help=f"Batches of {PruneConfig.batch_size} images over which BatchNorm statistics are "
        "measured again after the cut.",
    )
    round_to: int = shared(PruneConfig, "round_to")
    min_keep: float = shared(PruneConfig, "min_keep")
    seed: int = shared(
        PruneConfig, "seed", help="Seed of the order of images, and of --importance random."
    )
