"""Options of the commands other than ``prune``. Shared ones follow from its declarations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from job.config import (
    AllocationName,
    BadImageMode,
    CompensationName,
    DepthName,
    DeviceName,
    ImportanceName,
    PolicyName,
    PrecisionName,
    PreprocessingConfig,
    PruneConfig,
)
from job.errors import UsageError
from job.options import option, shared


def _refuse_empty(data: str | None) -> None:
    if data == "":  # e.g. a shell variable that is not set
        raise UsageError("--data is empty: give a path, or leave the option out")


@dataclass(frozen=True)
class ModelOptions(PreprocessingConfig):
    """Options that describe MODEL. A run, round or model folder needs only its path."""

    path: str
    model: str | None = shared(
        PruneConfig,
        "model",
        default=None,
        help="Network of a weights file: student, vgg19-cifar, resnet164-cifar, "
        "densenet40-cifar, a torchvision classification model, or your own as module:factory.",
    )
    model_arg: tuple[tuple[str, int | float | bool | str], ...] = shared(PruneConfig, "model_arg")
    num_classes: int | None = shared(PruneConfig, "num_classes", default_text="set by the weights")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Images to use, and the device."""

    data: str | None
    on_bad_image: BadImageMode = shared(PruneConfig, "on_bad_image")
    device: DeviceName = shared(PruneConfig, "device")
    precision: PrecisionName = shared(PruneConfig, "precision")
    workers: int | None = shared(PruneConfig, "workers")

    def __post_init__(self) -> None:
        """Raise UsageError for empty ``data``."""
        _refuse_empty(self.data)


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(ImageOptions):
    """Split on which MODEL is run."""

    split: str | None
    seed: int | None = shared(
        PruneConfig,
        "seed",
        default=None,
        help="Seed used to hold out a validation split.",
        default_text="the seed of MODEL's run",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoringOptions):
    """Options of ``evaluate``."""

    data: str | None = shared(
        PruneConfig,
        "data",
        help="Labelled images in any layout that prune takes.",
        default_text="the data of MODEL's run",
    )
    split: str | None = option(
        None,
        "Split to evaluate. The aliases train, val, dev, test and eval are accepted.",
        default_text="validation",
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ScoringOptions):
    """Options of ``predict``."""

    data: str | None = shared(
        PruneConfig,
        "data",
        help="Data set, folder of images, or single image.",
        default_text="the data of MODEL's run",
    )
    split: str | None = option(
        None,
        "Split to predict. The aliases train, val, dev, test and eval are accepted.",
        default_text="testing, or all images if there are no splits",
    )
    format: Literal["auto", "csv", "kaggle"] = option(
        "auto",
        "Columns: file,class,probability (csv) or Id,Category (kaggle). auto: kaggle if the split "
        "has numbered files, else csv.",
    )


@dataclass(frozen=True, kw_only=True)
class SlimOptions(ImageOptions):
    """Options of ``slim``. An option that is None gets the best value that the inputs allow."""

    data: str | None = shared(
        PruneConfig,
        "data",
        help="Calibration images. If they have labels, accuracy is measured too.",
        default_text=None,
    )
    target: str = shared(
        PruneConfig,
        "target",
        default="channels=0.5",
        help="Size after the cut: width, channels, params, macs, bytes or latency, as a fraction "
        "of MODEL's base (at most 1) or an absolute number. A latency is measured on this device, "
        "e.g. latency=0.6 or latency=5ms.",
        default_text=None,
    )
    latency_batch: int = shared(PruneConfig, "latency_batch")
    policy: PolicyName | None = shared(
        PruneConfig, "policy", default=None, default_text="uniform for a width, else global"
    )
    importance: ImportanceName | None = shared(
        PruneConfig, "importance", default=None, default_text="refit with --data, else gamma"
    )
    allocate: AllocationName | None = shared(
        PruneConfig,
        "allocate",
        default_text="outputs with --data and --compensate regress, else local",
    )
    depth: DepthName = shared(PruneConfig, "depth")
    compensate: CompensationName | None = shared(
        PruneConfig, "compensate", default=None, default_text="regress with --data, else none"
    )
    calibration_images: int | None = shared(PruneConfig, "calibration_images")
    recalibrate: int = shared(
        PruneConfig,
        "recalibrate",
        help=f"Number of batches of {PruneConfig.batch_size} images that re-estimate BatchNorm "
        "statistics after the cut.",
    )
    recover: int = shared(PruneConfig, "recover")
    round_to: int = shared(PruneConfig, "round_to")
    min_keep: float = shared(PruneConfig, "min_keep")
    seed: int = shared(
        PruneConfig, "seed", help="Seed of the image order and of --importance random."
    )


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of ``prepare``."""

    on_bad_image: BadImageMode = shared(PruneConfig, "on_bad_image")
    cache_dir: str | None = shared(PruneConfig, "cache_dir", default_text="SLURM_TMPDIR or TMPDIR")
    cache_max_side: int | None = shared(PruneConfig, "cache_max_side")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of ``bench``."""

    batch_sizes: tuple[int, ...] = option(
        (1, 32), "Batch sizes to measure, e.g. 1,32.", metavar="N,N,…"
    )
    threads: int | None = option(
        None,
        "Number of threads on a CPU.",
        at_least=1,
        default_text="the cores of this process, or OMP_NUM_THREADS",
    )
    device: DeviceName = shared(PruneConfig, "device")
    precision: PrecisionName = shared(
        PruneConfig,
        "precision",
        help="Precision of weights and images. auto: fp32 on a CPU, "
        "bf16 on a GPU that supports it, else fp16.",
    )
    memory_format: Literal["contiguous", "channels-last"] = option(
        "contiguous", "Memory format of weights and images."
    )
    compile: bool = option(False, "Also measure the networks compiled by torch.compile.")
    onnx: Literal["auto", "off"] = option(
        "auto",
        "Whether to measure the networks in onnxruntime too. auto: on a CPU in fp32, if it is "
        "installed. off: only ONNX files.",
    )
    seconds: float = option(
        2.0,
        "Seconds of measurement for each network at each batch size in each runtime.",
        metavar="SECONDS",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(ImageOptions):
    """Options of ``sensitivity``."""

    data: str | None = shared(
        PruneConfig,
        "data",
        help="Images to measure on; labels are not needed.",
        default_text="the data of MODEL's run",
    )
    target: str | None = shared(
        PruneConfig,
        "target",
        help="Size after a cut: channels, params, macs, bytes or latency, as a fraction of MODEL's "
        "base (at most 1) or an absolute number. A column shows how many channels the cut would "
        "keep.",
        default_text=None,
    )
    latency_batch: int = shared(PruneConfig, "latency_batch")
    calibration_images: int | None = shared(PruneConfig, "calibration_images")
    round_to: int = shared(PruneConfig, "round_to")
    min_keep: float = shared(PruneConfig, "min_keep")
    seed: int = shared(PruneConfig, "seed", help="Seed of the image order.")


@dataclass(frozen=True, kw_only=True)
class QuantisationOptions:
    """Options of ``export`` for 8-bit models."""

    int8: bool = option(
        False,
        "Quantise the ONNX model to 8 bits on calibration images, and print its accuracy before "
        "and after.",
    )
    data: str | None = shared(
        PruneConfig,
        "data",
        help="Images for --int8: calibration on the training split, accuracy on the validation "
        "split.",
        default_text="the data of MODEL's run",
    )
    calibration_images: int | None = shared(PruneConfig, "calibration_images")
    on_bad_image: BadImageMode = shared(PruneConfig, "on_bad_image")
    workers: int | None = shared(PruneConfig, "workers")
    seed: int = shared(PruneConfig, "seed", help="Seed of the order of the calibration images.")

    def __post_init__(self) -> None:
        """Raise UsageError for empty ``data``."""
        _refuse_empty(self.data)
