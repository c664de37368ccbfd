"""Configuration of ``prune``: a frozen dataclass that declares and checks every option.

A value is taken from the command line, the environment, a TOML file or the default, in this order.
``job.options`` describes what follows from a declaration.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from job.errors import UsageError
from job.options import option

if TYPE_CHECKING:
    from job.files import JsonObject

ResumeMode = Literal["auto", "never", "require"]
BadImageMode = Literal["fail", "skip"]
CacheMode = Literal["auto", "off", "ram", "disk"]
PresetName = Literal["homework", "small", "imagenet"]
WeightsPackage = Literal["timm", "torchvision"]  # whose preprocessing --transform can take
InterpolationName = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["constant", "cosine", "step"]
PolicyName = Literal["uniform", "global"]
AllocationName = Literal["outputs", "local"]
DepthName = Literal["auto", "off"]
ImportanceName = Literal["gamma", "l2", "random", "refit", "taylor"]
CompensationName = Literal["none", "beta", "mean", "regress"]
BatchNormMode = Literal["sync", "local"]
SparsityName = Literal["none", "l1", "polarize"]
DeviceName = Literal["auto", "cpu", "cuda"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
LogFormat = Literal["text", "json"]
TrackerName = Literal["wandb", "tensorboard", "mlflow", "none"]
WandbMode = Literal["auto", "online", "offline", "off"]

CLASSIFICATION = "classification"


def output_loss_of(task: str) -> str | None:
    """Return how the outputs of a network for ``task`` are compared; None for logits of classes."""
    return None if task == CLASSIFICATION else "squared_error"


def policy_for(target: str | None) -> PolicyName:
    """Return the default policy: a width, or --rate without a target, is that of all groups."""
    return "uniform" if (target or "width").startswith("width") else "global"


def allocation_caution(allocate: str | None, policy: str) -> str | None:
    """Return the caution about an allocation that the policy does not use, or None."""
    if allocate and policy == "uniform":
        return f"--allocate {allocate} has no effect without --policy global"
    return None


DETECTION = "detection"
LOGIT_TASKS = (CLASSIFICATION, "multi-label")  # whose networks return logits (B, classes)
DEFAULT_BASE_EPOCHS = 24
DEFAULT_SPARSITY = 1e-4  # Liu et al. 2017, for VGG
MAX_DROP = 1.0  # percentage points of accuracy that a recommended model may lose

OF_TRANSFORM = "set by --transform"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set."""

    data: str | None = option(
        None,
        "Folder of images or IDX files, a CSV file, a zip or tar file, or WebDataset shards, e.g. "
        "train-{000..147}.tar.",
        metavar="PATH",
        default_text="built-in Fashion-MNIST",
        changes_result=False,  # the fingerprint of the content is compared instead
    )
    task: str = option(
        CLASSIFICATION,
        "What the network is trained for: classification, multi-label (images of several classes "
        "each), segmentation (images and masks), detection (images and boxes), or your own task as "
        "module:factory, with data, loss and metrics.",
    )
    on_bad_image: BadImageMode = option("fail", "What to do with an image that cannot be read.")
    cache: CacheMode = option(
        "auto",
        "Cache of decoded images, shared by all processes of a node: on disk, where later runs "
        "find it, in memory (ram), or none (off). auto: disk or memory with ample space, else "
        "none. Results are the same.",
        changes_result=False,
    )
    cache_dir: str | None = option(
        None,
        "Folder of the cache, best on a local disk.",
        metavar="PATH",
        default_text="SLURM_TMPDIR or TMPDIR; with --cache disk else the run folder",
        changes_result=False,
    )
    cache_max_side: int | None = option(
        None,
        "Largest number of pixels on the longer side of an image; larger images are reduced before "
        "any other preprocessing. For large photographs; it changes the inputs of the network.",
        at_least=1,
        default_text="no limit",
        changes_result=False,  # whether an image is larger is compared instead
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessingConfig:
    """Preprocessing: how images become inputs of the network."""

    transform: str = option(
        "auto",
        "Preprocessing of the images: homework, small, imagenet, or that of pretrained weights, "
        "e.g. timm:resnet50 or torchvision:ResNet50_Weights.IMAGENET1K_V2. auto: small for images "
        "of up to 64 pixels, else homework. The options below override it.",
    )
    image_size: int | None = option(
        None, "Side of the network's input, in pixels.", at_least=1, default_text=OF_TRANSFORM
    )
    mean: tuple[float, float, float] | None = option(
        None,
        "Mean to subtract from each channel, on a scale from 0 to 1: three numbers or one.",
        default_text=OF_TRANSFORM,
    )
    std: tuple[float, float, float] | None = option(
        None,
        "Standard deviation to divide each channel by: three numbers or one.",
        default_text=OF_TRANSFORM,
    )
    resize: str | None = option(
        None,
        "Size before the crop: 256 (the shorter side), 256x256 (both sides, ignoring the aspect "
        "ratio), longer:256, or none.",
        default_text=OF_TRANSFORM,
    )
    crop: float | None = option(
        None,
        "Central crop: a fraction of the resized side, e.g. 0.875, or a number of pixels, which "
        "also sets the image size.",
        default_text=OF_TRANSFORM,
    )
    interpolation: InterpolationName | None = option(
        None, "Interpolation used to resize images.", default_text=OF_TRANSFORM
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its weights."""

    model: str = option(
        "student",
        "Network: student, vgg19-cifar, resnet164-cifar, densenet40-cifar, a torchvision "
        "classification model, one of timm as timm:NAME, or your own as module:factory.",
    )
    model_arg: tuple[tuple[str, int | float | bool | str], ...] = option(
        (),
        "Argument of the network, e.g. width_mult=0.95 or aux_logits=true. Can be repeated.",
    )
    weights: str | None = option(
        None,
        "Weights to start from: a state dict (.safetensors, .pt, .pth or .bin), or a run, "
        "round or model folder.",
        metavar="PATH",
        changes_result=False,  # their content is compared instead
    )
    num_classes: int | None = option(
        None, "Number of classes.", at_least=1, default_text="set by the data or weights"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Base training and fine-tuning."""

    base_epochs: int | None = option(
        None,
        "Epochs of base training.",
        at_least=0,
        default_text=f"{DEFAULT_BASE_EPOCHS}, or 0 with --weights",
    )
    epochs: int = option(5, "Epochs of fine-tuning in each round.", at_least=1)
    batch_size: int = option(32, "Global batch size, split over the processes.", at_least=1)
    accumulate: int = option(
        1,
        "Number of parts of each batch, whose gradients are accumulated before the optimizer's "
        "step, to save memory. BatchNorm normalises each part by its own statistics.",
        at_least=1,
    )
    optimizer: OptimizerName = option(
        "adamw", "Optimizer. Each round creates a new one. sgd uses momentum."
    )
    lr: float = option(1e-3, "Learning rate at the start of each round.", above=0)
    weight_decay: float = option(
        0.01, "Weight decay. Biases and BatchNorm parameters are exempt.", at_least=0
    )
    schedule: ScheduleName = option("cosine", "Learning rate schedule within each round.")
    batchnorm: BatchNormMode = option(
        "sync",
        "BatchNorm statistics in training: over the global batch (sync), or over each process's "
        "share of it (local).",
    )


@dataclass(frozen=True, kw_only=True)
class SlimmingConfig:
    """Cuts: how many channels each round removes, and which."""

    rounds: int | Literal["auto"] = option(
        5,
        "Number of rounds. Each round cuts and fine-tunes the network. auto: continue until a "
        "round loses more than --max-drop.",
    )
    rate: float = option(
        0.95, "Width after each round, relative to the previous round.", above=0, at_most=1
    )
    target: str | None = option(
        None,
        "Size after the last round: width, channels, params, macs, bytes or latency, as a fraction "
        "of the base (at most 1) or an absolute number. A latency is measured on this device, e.g. "
        "latency=0.6 or latency=5ms.",
        default_text="--rate in each round",
    )
    latency_batch: int = option(
        1, "Batch size at which --target latency=… is measured.", at_least=1
    )
    policy: PolicyName | None = option(
        None,
        "Allocation of the cut: the same fraction of every channel group (uniform), or one "
        "threshold over all groups (global).",
        default_text="global with --target, but uniform for a width; uniform without",
    )
    importance: ImportanceName = option(
        "refit",
        "Criterion that ranks channels: BatchNorm scale (gamma), norm of the weights (l2), random "
        "order (random), error of the next layers after they are refitted (refit), or first-order "
        "change of the loss (taylor).",
    )
    allocate: AllocationName | None = option(
        None,
        "Measure by which the global policy compares channel groups: the loss of the network's "
        "outputs when a group is cut, on calibration images (outputs), or the importance of "
        "channels alone (local).",
        default_text="outputs with --compensate regress, else local",
    )
    depth: DepthName = option(
        "auto",
        "Removal of whole residual branches: where it changes the outputs least, with --allocate "
        "outputs (auto), or never (off).",
    )
    compensate: CompensationName = option(
        "regress",
        "Compensation for removed channels in the next layers: none, the activation of β (beta), "
        "the mean activation (mean), or weights refitted to the previous outputs (regress).",
    )
    calibration_images: int | None = option(
        None,
        "Number of calibration images, on which cuts are measured and to which they are fitted. "
        "Labels are used by --importance taylor only.",
        default_text="4096, or fewer above 64 pixels: 512 at 224",
        at_least=1,
    )
    recalibrate: int = option(
        0, "Number of batches that re-estimate BatchNorm statistics after a cut.", at_least=0
    )
    recover: int = option(
        0,
        "Epochs of recovery after each cut: the narrow network learns the outputs and features of "
        "the network before the cut, on the calibration images, without labels.",
        at_least=0,
    )
    round_to: int = option(1, "Keep a multiple of N channels in each group.", at_least=1)
    min_keep: float = option(
        0.1, "Smallest fraction of each group that the global policy keeps.", at_least=0, at_most=1
    )
    max_drop: float | None = option(
        None,
        "Largest accuracy drop of a round below the base, in percentage points. The first round "
        "that loses more is the last.",
        metavar="POINTS",
        at_least=0,
        at_most=100,
        default_text=f"no limit; {MAX_DROP:g} with --rounds auto",
    )


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Sparsity training and distillation."""

    sparsity: SparsityName = option("none", "Penalty on γ in the last epochs before the first cut.")
    sparsity_weight: float | None = option(
        None, "Weight of the penalty.", metavar="λ", above=0, default_text=f"{DEFAULT_SPARSITY:g}"
    )
    sparsity_epochs: int = option(
        0, "Epochs of training with the penalty, after --base-epochs.", at_least=0
    )
    distill_alpha: float = option(
        0.0,
        "Weight of the distillation loss. The loss on the labels has the remaining weight.",
        at_least=0,
        at_most=1,
    )
    distill_temperature: float = option(
        4.0, "Temperature that softens the outputs of the teacher and the network.", above=0
    )
    teacher: str | None = option(
        None,
        "Teacher for distillation: a run, round or model folder.",
        metavar="MODEL",
        default_text="the base",
        changes_result=False,  # its content is compared instead
    )


@dataclass(frozen=True, kw_only=True)
class RunningConfig:
    """Run folder, resuming, and the device."""

    output: str | None = option(
        None,
        "Run folder, or the URL of one in an object store, e.g. s3://bucket/runs/one.",
        metavar="RUN",
        default_text="runs/MODEL-DATA, or the next free number if its options differ",
        changes_result=False,
    )
    resume: ResumeMode = option(
        "auto",
        "Whether to resume the run in the folder. auto: resume it if there is one. never: start a "
        "new run. require: fail if there is none.",
        changes_result=False,
    )
    checkpoint_every: float = option(
        300.0,
        "Seconds between checkpoints within an epoch.",
        metavar="SECONDS",
        at_least=0,
        changes_result=False,
    )
    seed: int = option(
        0, "Seed of initial weights, sample order and augmentation.", at_least=0, at_most=2**63 - 1
    )
    device: DeviceName = option("auto", "Device to run on. auto: a GPU if there is one.")
    precision: PrecisionName = option(
        "auto",
        "Floating-point precision. auto: fp32 on a CPU, bf16 on a GPU that supports it, else fp16.",
    )
    compile: bool = option(
        False,
        "Train with torch.compile: each round compiles its network, which takes a minute or so, "
        "and then trains faster on a GPU. Weights differ by rounding.",
    )
    workers: int | None = option(
        None,
        "Number of data loader processes, or of threads for cached images on a CPU.",
        at_least=0,
        default_text="depends on the number of cores",
        changes_result=False,
    )
    log: LogFormat = option(
        "text",
        "Format of console output: text, or one JSON object a line (json).",
        changes_result=False,
    )
    dry_run: bool = option(
        False, "Check everything, show the plan, train nothing.", changes_result=False
    )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the numbers of a run are logged."""

    tracker: tuple[TrackerName, ...] = option(
        ("wandb",),
        "Where to log the run. Separate several trackers by commas, or repeat the option.",
        changes_result=False,
    )
    wandb: WandbMode = option(
        "auto",
        "Whether to log the run to Weights & Biases. auto: online if an API key is configured, "
        "else offline, in the run folder.",
        changes_result=False,
    )
    wandb_project: str = option(
        "gammaslim", "Weights & Biases project to log to.", changes_result=False
    )


SECTIONS: dict[str, type] = {  # of the help page, and of the table of options
    "Data": DataConfig,
    "Preprocessing": PreprocessingConfig,
    "Model": ModelConfig,
    "Training": TrainingConfig,
    "Slimming": SlimmingConfig,
    "Sparsity and distillation": SparsityConfig,
    "Running": RunningConfig,
    "Tracking": TrackingConfig,
}


@dataclass(frozen=True, kw_only=True)
class PruneConfig(  # Python orders the fields of the last base first
    TrackingConfig,
    RunningConfig,
    SparsityConfig,
    SlimmingConfig,
    TrainingConfig,
    ModelConfig,
    PreprocessingConfig,
    DataConfig,
):
    """Every option of ``gammaslim prune``. An option that is None follows from other options,
    the data or the weights.
    """

    def __post_init__(self) -> None:
        """Raise UsageError for options that contradict each other."""
        for name in ("data", "output", "weights", "teacher", "cache_dir"):
            if getattr(self, name) == "":  # e.g. a shell variable that is not set
                raise UsageError(
                    f"--{name.replace('_', '-')} is empty: give a path, or leave the option out"
                )
        if self.cache_dir and self.cache in ("off", "ram"):
            raise UsageError(f"--cache-dir has no effect with --cache {self.cache}: leave one out")
        if self.sparsity != "none" and not self.sparsity_epochs:
            raise UsageError(
                f"--sparsity {self.sparsity} needs --sparsity-epochs: add e.g. --sparsity-epochs 10"
            )
        if self.sparsity == "none" and (self.sparsity_epochs or self.sparsity_weight is not None):
            name = "epochs" if self.sparsity_epochs else "weight"
            raise UsageError(f"--sparsity-{name} needs --sparsity l1 or --sparsity polarize")
        if self.rounds == "auto" and self.target:
            raise UsageError(
                f"--target {self.target} is spread over a fixed number of rounds: leave out "
                "--rounds auto or --target"
            )
        if self.rounds == "auto" and self.rate >= 1:
            raise UsageError(
                f"--rounds auto never ends with --rate {self.rate:g}: give a rate below 1, e.g. 0.9"
            )
        if ":" in self.task:
            self._check_own_task("mean", "std", "cache_max_side")
        if self.task == DETECTION:
            self._check_own_task()
            self._check_detection()
        if self.task != CLASSIFICATION and self.importance == "taylor":
            raise UsageError(
                "--importance taylor needs the labels of --task classification: take refit or gamma"
            )
        if self.teacher and not self.distill_alpha:
            raise UsageError("--teacher has no effect without --distill-alpha: add e.g. 0.9")
        names = ",".join(self.tracker)
        if "none" in self.tracker and len(self.tracker) > 1:
            raise UsageError(f"--tracker {names}: none excludes the others, leave it out")
        if self.wandb in ("online", "offline") and "wandb" not in self.tracker:
            raise UsageError(
                f"--wandb {self.wandb} has no effect with --tracker {names}: leave one out"
            )

    @property
    def wandb_mode(self) -> WandbMode:
        """How W&B runs; off unless it is among the trackers."""
        return self.wandb if "wandb" in self.tracker else "off"

    def _check_own_task(self, *more: str) -> None:
        """Raise UsageError for options of preprocessing that the task or its network performs."""
        for name in (*more, "resize", "crop", "interpolation"):
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} has no effect with --task {self.task}: leave it out")
        if self.transform != "auto":
            raise UsageError(f"--transform has no effect with --task {self.task}: leave it out")

    def _check_detection(self) -> None:
        """Raise UsageError for options that detectors do not support."""
        for given, flag in ((self.compile, "--compile"), (self.distill_alpha, "--distill-alpha")):
            if given:
                raise UsageError(f"{flag} does not work with --task {DETECTION}: leave it out")

    @property
    def first_epochs(self) -> int:
        """Epochs of base training; by default 0 with weights."""
        if self.base_epochs is not None:
            return self.base_epochs
        return 0 if self.weights else DEFAULT_BASE_EPOCHS

    @property
    def last_round(self) -> int | None:
        """Number of the last round; None if it depends on the accuracies."""
        return self.rounds if isinstance(self.rounds, int) else None

    @property
    def cut_policy(self) -> PolicyName:
        """Policy of the cuts; by default the one that fits the target."""
        return self.policy or policy_for(self.target)

    @property
    def most_points_lost(self) -> float | None:
        """Largest accuracy drop below the base in percentage points; None for no limit."""
        return MAX_DROP if self.max_drop is None and self.last_round is None else self.max_drop

    @property
    def sparsity_strength(self) -> float:
        """Weight λ of the sparsity penalty on γ, in units of the loss."""
        return DEFAULT_SPARSITY if self.sparsity_weight is None else self.sparsity_weight

    @property
    def cautions(self) -> list[str]:
        """Cautions about combinations of options that cost accuracy, or have no effect."""
        found = [allocation_caution(self.allocate, self.cut_policy)]
        if self.importance == "refit" and self.compensate in ("beta", "mean"):
            found.append(
                "--importance refit assumes --compensate regress: with "
                f"--compensate {self.compensate} the accuracy right after a cut is far lower than "
                "with --importance gamma"
            )
        latency = str(self.target or "").startswith("latency")
        for name, used, with_ in (
            ("rate", not self.target, f"with --target {self.target}"),
            ("distill_temperature", bool(self.distill_alpha), "without --distill-alpha"),
            ("latency_batch", latency, "without --target latency=VALUE"),
        ):
            if not used and getattr(self, name) != OPTION_DEFAULTS.get(name):
                found.append(f"--{name.replace('_', '-')} has no effect {with_}")
        if self.accumulate > self.batch_size:
            found.append(
                f"--accumulate {self.accumulate} is more than --batch-size {self.batch_size}: a "
                "batch has at most as many parts as images"
            )
        return [caution for caution in found if caution]

    @property
    def args(self) -> dict[str, int | float | bool | str]:
        """``--model-arg`` as keyword arguments."""
        return dict(self.model_arg)

    def to_dict(self) -> JsonObject:
        """The options that are not None, as values of TOML; with the policy of the cuts."""
        values = asdict(self) | {
            "model_arg": [f"{key}={value}" for key, value in self.model_arg],
            "policy": self.cut_policy,
        }
        lists = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        return {key: value for key, value in lists.items() if value is not None}


OPTION_DEFAULTS = PruneConfig().to_dict()  # by name; an option whose default is None is left out
