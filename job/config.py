"""Configuration of the main job: frozen; defaults < TOML file < environment < command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from job.errors import ConfigError, InputNotFound, UsageError, did_you_mean, shown
from job.files import parse_toml, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ResumeMode = Literal["auto", "never", "require"]
BadImageMode = Literal["fail", "skip"]
InterpolationName = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["constant", "cosine", "step"]
PolicyName = Literal["uniform", "global"]
ImportanceName = Literal["gamma", "l2", "random", "refit", "taylor"]
CompensationName = Literal["none", "beta", "mean", "regress"]
BatchNormMode = Literal["sync", "local"]
SparsityName = Literal["none", "l1", "polarize"]
DeviceName = Literal["auto", "cpu", "cuda"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
WandbMode = Literal["auto", "online", "offline", "off"]

# Options that may differ when a run is resumed: they cannot change its result.
HARMLESS = frozenset(
    {
        "data",
        "output",
        "resume",
        "weights",  # their content is compared in place of the path, as the teacher's is
        "teacher",
        "workers",
        "wandb",
        "wandb_project",
        "dry_run",
        "checkpoint_every",
    }
)


@dataclass(frozen=True)
class PruneConfig:
    """Every option of ``gammaslim prune``; ``None`` means: found out from the data or weights."""

    data: str | None = None
    output: str | None = None
    resume: ResumeMode = "auto"
    on_bad_image: BadImageMode = "fail"
    transform: str = "auto"
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize: str | None = None
    crop: float | None = None
    interpolation: InterpolationName | None = None
    model: str = "student"
    model_arg: tuple[tuple[str, int | float | bool | str], ...] = ()
    weights: str | None = None
    num_classes: int | None = None
    base_epochs: int | None = None
    rounds: int | Literal["auto"] = 5  # auto: until a round loses too much
    rate: float = 0.95
    epochs: int = 5
    batch_size: int = 32
    optimizer: OptimizerName = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: ScheduleName = "cosine"
    policy: PolicyName = "uniform"
    target: str | None = None
    round_to: int = 1
    min_keep: float = 0.1
    importance: ImportanceName = "refit"
    compensate: CompensationName = "regress"
    recalibrate: int = 0
    batchnorm: BatchNormMode = "sync"
    sparsity: SparsityName = "none"
    sparsity_weight: float | None = None
    sparsity_epochs: int = 0
    distill_alpha: float = 0.0
    distill_temperature: float = 4.0
    teacher: str | None = None
    max_drop: float | None = None
    seed: int = 0
    device: DeviceName = "auto"
    precision: PrecisionName = "auto"
    workers: int | None = None
    wandb: WandbMode = "auto"
    wandb_project: str = "gammaslim"
    checkpoint_every: float = 300.0
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError where options contradict each other."""
        for name in ("data", "output", "weights", "teacher"):
            if getattr(self, name) == "":  # as from a shell variable that is not set
                raise UsageError(f"--{name} is empty: give a path, or leave the option out")
        if self.sparsity != "none" and not self.sparsity_epochs:
            raise UsageError(
                f"--sparsity {self.sparsity} acts in its own epochs: give their number, e.g. "
                "--sparsity-epochs 10"
            )
        if self.sparsity == "none" and (self.sparsity_epochs or self.sparsity_weight is not None):
            option = "epochs" if self.sparsity_epochs else "weight"
            raise UsageError(f"--sparsity-{option} needs --sparsity l1 or --sparsity polarize")
        if self.rounds == AUTO and self.target:
            raise UsageError(
                f"--target {self.target} is spread over a number of rounds, --rounds auto has "
                "none: leave one of them out"
            )
        if self.rounds == AUTO and self.rate >= 1:
            raise UsageError(f"--rounds auto would never end at --rate {self.rate:g}: e.g. 0.9")
        if self.teacher and not self.distill_alpha:
            raise UsageError("--teacher has no effect without --distill-alpha, e.g. 0.9")

    @property
    def first_epochs(self) -> int:
        """Epochs of base training: none when there are weights, unless asked for."""
        if self.base_epochs is not None:
            return self.base_epochs
        return 0 if self.weights else DEFAULT_BASE_EPOCHS

    @property
    def last_round(self) -> int | None:
        """The number of the last round; None: that is for the accuracies to decide."""
        return self.rounds if isinstance(self.rounds, int) else None

    @property
    def most_points_lost(self) -> float | None:
        """Points of accuracy below the base after which a round is the last, if there are such."""
        return MAX_DROP if self.max_drop is None and self.last_round is None else self.max_drop

    @property
    def sparsity_strength(self) -> float:
        """λ: how hard sparsity pulls on γ, in units of the loss."""
        return DEFAULT_SPARSITY if self.sparsity_weight is None else self.sparsity_weight

    @property
    def caution(self) -> str | None:
        """What is likely to disappoint, said before a run."""
        if self.importance == "refit" and self.compensate in ("beta", "mean"):
            return (
                f"--importance refit counts on --compensate regress; with "
                f"{self.compensate} the accuracy right after a cut is far lower than with gamma"
            )
        return None

    @property
    def args(self) -> dict[str, Any]:
        """``--model-arg`` as keyword arguments."""
        return dict(self.model_arg)

    def to_dict(self) -> dict[str, Any]:
        """Options that are set, as TOML can hold them."""
        values = asdict(self) | {"model_arg": [f"{key}={value}" for key, value in self.model_arg]}
        lists = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        return {key: value for key, value in lists.items() if value is not None}


AUTO = "auto"
MAX_DROP = 1.0  # points of accuracy below the base that a recommended model may have
DEFAULT_BASE_EPOCHS = 24
DEFAULT_SPARSITY = 1e-4  # Liu et al. 2017, for VGG


def read_toml(source: str, command: str, options: Iterable[str]) -> dict[str, Any]:
    """Values for ``command`` in a recipe or TOML file: keys at the top and in ``[command]``.

    Tables of other commands and those that a run adds to its own config.toml are passed over.
    Raises InputNotFound, or ConfigError for TOML that is wrong or a key that is no option.
    """
    name, text = _config_text(source)
    try:
        content = parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error
    own = content.pop(command, {})
    if not isinstance(own, dict):
        raise ConfigError(f"{name}: {command} must be a table, [{command}]")
    top = {key: value for key, value in content.items() if not isinstance(value, dict)}
    for table in set(content) - set(top) - TABLES:
        near = did_you_mean(table, TABLES)
        raise ConfigError(f"{name}: there is no table [{table}]{near}")
    known = {option.replace("-", "_") for option in options}
    values = {}
    for key, value in {**top, **own}.items():
        plain = key.replace("-", "_")
        if plain not in known:
            raise ConfigError(f"{name}: {command} has no option {key}{did_you_mean(plain, known)}")
        values[plain] = value
    return values


TABLES = frozenset(
    {"prune", "launch", "evaluate", "predict", "inspect", "slim", "export", "report"}
    | {"versions", "dataset", "base"}
)


def recipes() -> dict[str, str]:
    """The built-in configurations: name -> TOML text."""
    folder = resources.files("job") / "recipes"
    files = sorted(folder.iterdir(), key=lambda f: f.name)
    return {f.name[:-5]: f.read_text("utf-8") for f in files if f.name.endswith(".toml")}


def _config_text(source: str) -> tuple[str, str]:
    built_in = recipes()
    if source in built_in:
        return f"recipe {source}", built_in[source]
    path = Path(source)
    if not path.is_file():
        raise InputNotFound(
            f"--config {shown(source)} is neither a file nor a recipe ({', '.join(built_in)})"
        )
    try:
        return shown(source), read_bytes(path).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown(source)} cannot be read: {error}") from error


def write_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML text of tables of strings, numbers, booleans and lists of strings."""
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    text = shown(str(value)).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in text) + '"'
