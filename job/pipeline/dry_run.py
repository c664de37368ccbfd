"""``--dry-run``: look for all that would stop or slow a run, before a queue is waited for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from job.artifacts.checkpoint import KEPT
from job.artifacts.model_card import find_model, load_model
from job.artifacts.run_directory import Run
from job.artifacts.run_folder import choose
from job.console import counted, print_error, say, warn
from job.data.loader import default_workers
from job.data.splits import ArraySplit
from job.distributed.collectives import on_main
from job.distributed.cores import available_cores
from job.errors import ConfigError, GammaslimError, StopRequest, StorageError, shown
from job.files import check_writable, is_file
from job.models.weights_file import read_state
from job.pipeline.base_model import base_network, base_record, teacher_network
from job.pipeline.cautions import of_sample
from job.pipeline.setup import PLANNED, planned_rounds, training_tools
from job.pipeline.slim_round import cut
from job.pipeline.training_data import dataset_record, prepare_data
from job.processes import is_main, local_world_size, world_size
from job.report.tables import rounds_table
from job.tracking import key_check
from job.training.distillation import distillation
from job.training.trial import least_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.artifacts.records import PlannedRound
    from job.config import PruneConfig
    from job.data.dataset import Dataset
    from job.distributed.stop import Watch

T = TypeVar("T")
WANDB_WAIT = 60  # seconds for importing W&B and asking its server
NO_KEY = "no API key is configured: set WANDB_API_KEY, or run wandb login"
WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
TINY = 8  # a last batch of less than an eighth is one


class Findings:
    """What is wrong: the same on every process, for the main one to say."""

    def __init__(self) -> None:
        self.errors: list[GammaslimError] = []
        self.warnings: list[str] = []

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Do collective ``work``; None when it fails, which is then an error found."""
        try:
            return work()
        except StopRequest:
            raise
        except GammaslimError as error:
            self.errors.append(error)
        return None

    def conclude(self) -> None:
        """Say all; raises the first error, whose exit code is the command's, as the last."""
        if is_main():
            for warning in self.warnings:
                warn(warning)
            for error in self.errors[1:]:
                print_error(str(error))
        if self.errors:
            raise self.errors[0]


def dry_run(config: PruneConfig, watch: Watch, accelerator: Accelerator) -> None:
    """Check all that a run needs, try each of its steps once, write nothing; collective.

    Raises the first GammaslimError found.
    """
    found = Findings()
    if config.caution:
        found.warnings.append(config.caution)
    planned = _check_inputs(config, watch, accelerator, found)
    output = watch.stop_file.parent
    found.attempt(lambda: on_main(lambda: check_writable(output)))
    if planned:
        found.attempt(lambda: on_main(lambda: _check_disk(config, planned, output)))
    _check_wandb(config.wandb, found)
    if not found.errors and planned:
        begun = on_main(lambda: Run(output).base_epochs)
        epochs = config.first_epochs if begun is None else begun
        trained = f"{counted(epochs, 'epoch')} of base training"
        if config.sparsity_epochs:
            trained += f", {config.sparsity_epochs} with {config.sparsity} on γ"
        say(f"output: {shown(output)} can be written{on_main(lambda: _resumed(output))}")
        say(f"plan: {trained}, then {_rounds_text(config)}")
        say(rounds_table(planned))
        if config.last_round is None:
            more = "…" if len(planned) > PLANNED else "then nothing more can be cut"
            say(f"{more} (a forecast)" if more != "…" else more)
        say("dry run: all is well, nothing was trained")
    found.conclude()


def _rounds_text(config: PruneConfig) -> str:
    if config.last_round is not None:
        return f"{counted(int(config.rounds), 'round')} of {counted(config.epochs, 'epoch')}"
    return (
        f"rounds of {counted(config.epochs, 'epoch')} until one is more than "
        f"{config.most_points_lost:g} points below the base, or nothing more can be cut"
    )


def _resumed(output: Path) -> str:
    """What there is of the run already."""
    if not is_file(output / "config.toml"):
        return ""
    if not (done := Run(output).saved):
        return "; a run that has not finished its base is resumed"
    return f"; its run is resumed: the base and {done - 1} rounds are saved"


def _check_inputs(
    config: PruneConfig, watch: Watch, accelerator: Accelerator, found: Findings
) -> list[PlannedRound] | None:
    """The planned rounds, where data, weights, target and the run to resume are right."""
    output = watch.stop_file.parent
    prepared = found.attempt(lambda: prepare_data(config, watch.check_here, output))
    if prepared is None:
        if config.weights:  # whether they fit can only be said with the data's classes
            found.attempt(lambda: on_main(lambda: _readable(str(config.weights))))
        return None
    data, preprocessing = prepared
    found.warnings += core_warnings(config, data, accelerator.device.type == "cuda")
    torch.manual_seed(config.seed)
    based = found.attempt(
        lambda: on_main(lambda: base_network(config, data, preprocessing), interrupt=True)
    )
    size, count = config.batch_size, len(data.splits["training"])
    if based is None:
        found.warnings += batch_warnings(size, count, world_size())
        return None
    network, card = based
    least = found.attempt(
        lambda: on_main(lambda: least_batch(network, config, preprocessing.size, count))
    )
    found.warnings += batch_warnings(size, count, world_size(), least or 1)
    planned = found.attempt(
        lambda: on_main(lambda: planned_rounds(config, network, card), interrupt=True)
    )

    def check_run() -> None:
        teacher = on_main(lambda: teacher_network(config, card), interrupt=True)
        origin = base_record(config, card, teacher)
        record = on_main(lambda: dataset_record(data))
        output, why = on_main(lambda: choose(config, record, origin))
        watch.follow(output / "STOP")
        on_main(lambda: Run(output).check(config, record, origin))
        if why:
            say(f"output: {shown(output)}, as {why}")

    found.attempt(check_run)
    if planned and not found.errors:
        tried = (config, data, network, card, accelerator, least or 1, watch, len(planned) - 1)
        low = found.attempt(lambda: _try(*tried))
        found.warnings += [low] if low else []
    return planned


def _try(
    config: PruneConfig,
    data: Dataset,
    network: nn.Module,
    card: ModelCard,
    accelerator: Accelerator,
    least: int,
    watch: Watch,
    rounds: int,
) -> str | None:
    """One evaluation batch; for the base and each of ``rounds`` its cut and one training step.

    Cuts are measured on one batch of images. Returns a caution where weights score low. Raises what
    the job would.
    """
    evaluator, trainer, calibration = training_tools(
        config, data, card.preprocessing, accelerator, least, watch
    )
    calibration.most = config.batch_size
    evaluator.try_batch(network)
    caution = None
    if config.weights and "fresh_classifier" not in card.lineage:
        caution = of_sample(evaluator, network)
    learned = None
    if config.distill_alpha:
        teacher = on_main(lambda: teacher_network(config, card), interrupt=True) or network
        weights = config.distill_alpha, config.distill_temperature
        learned = distillation(teacher, *weights, accelerator)
    for round_ in range(rounds + 1):
        watch.check()
        if round_:
            network, card, _ = cut(network, card, round_, config, accelerator.device, calibration)
        trainer.try_step(network, learned)
    cuts = f", the cuts of {counted(rounds, 'round')}" if rounds else ""
    say(f"tried: an evaluation batch, a training step{cuts}")
    return caution


def _readable(weights: str) -> None:
    if Path(weights).is_dir():
        load_model(find_model(weights))
    else:
        read_state(weights)


def _check_disk(config: PruneConfig, planned: Sequence[PlannedRound], output: Path) -> None:
    """Raise StorageError unless there is room for what the run will write."""
    place = next(p for p in (output, *output.absolute().parents) if p.exists())
    needed, free = space_needed(config, planned), shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"{shown(place)} has {free:,} bytes free, the run needs about {needed:,}: "
            "free some space or choose another --output"
        )
    say(f"disk: the run needs about {_amount(needed)}, {_amount(free)} are free")


def space_needed(config: PruneConfig, planned: Sequence[PlannedRound]) -> int:
    """Bytes that a run's models, positions and W&B files take at most, about.

    A position has the network, the best one so far and the optimizer's one or two states; a new
    one is written before the oldest goes.
    """
    models = sum(entry.bytes for entry in planned)
    states = {"adamw": 2, "sgd": 1}[config.optimizer]
    positions = (KEPT + 1) * (2 + states) * max(entry.bytes for entry in planned)
    copies = models if config.wandb != "off" else 0  # W&B's, of each model
    return int(models + positions + copies + 2**22)  # and some for tables and logs


def _amount(count: int) -> str:
    """``count`` bytes to two digits: 1.2 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{float(f'{count / size:.2g}'):g} {unit}"
    return f"{count:,} bytes"


def batch_warnings(batch: int, count: int, processes: int, least: int = 1) -> list[str]:
    """What is unfortunate about global batches of ``batch`` out of ``count`` pictures."""
    found = []
    if batch % processes:
        low = batch // processes
        near = max(processes, round(batch / processes) * processes)
        found.append(
            f"--batch-size {batch} over {processes} processes gives some {low} and some {low + 1} "
            f"images: a multiple, e.g. {near}, keeps all busy"
        )
    last = count % batch
    if last >= least and last and (last < processes or last * TINY < batch):
        sizes = sorted(range(batch // 2 + 1, batch * 2), key=lambda size: abs(size - batch))
        good = (s for s in sizes if s % processes == 0 and (count % s == 0 or count % s * 2 >= s))
        better = f": --batch-size {size} would be better" if (size := next(good, 0)) else ""
        found.append(
            f"the last batch of an epoch has only {last} of {batch} images, and a step and "
            f"BatchNorm statistics of its own{better}"
        )
    return found


def core_warnings(config: PruneConfig, data: Dataset, cuda: bool) -> list[str]:
    """Whether the cores that this node gives the job are too few for its processes."""
    processes, cores = local_world_size(), available_cores()
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        cores = min(cores, int(slurm))
    workers = default_workers(processes, cuda) if config.workers is None else config.workers
    if isinstance(data.splits["training"], ArraySplit):
        workers = 0  # the pictures are in memory
    # a process that waits for its GPU leaves its core to a loader, but not all the time
    wanted = max(2, workers + (not cuda)) if workers else 1
    if cores >= wanted * processes:
        return []
    loaders = f"with {workers} loader processes each " if workers else ""
    return [
        f"{cores} cores here for {processes} training process{'es' * (processes > 1)} "
        f"{loaders}want {wanted * processes}: give more (Slurm: --cpus-per-task, and for srun "
        "SRUN_CPUS_PER_TASK), or fewer --workers"
    ]


def _check_wandb(mode: str, found: Findings) -> None:
    """Say how W&B will run; what is wrong is an error where --wandb online asks for it."""
    given = os.environ.get("WANDB_MODE", "")
    if mode == "auto" and given and given not in ("online", "run"):
        return say(f"W&B: {given}, by WANDB_MODE")
    if mode in ("off", "offline"):
        return say(f"W&B: {mode}")
    answer = on_main(ask_wandb)
    if user := answer.get("user"):
        return say(f"W&B: online at {answer['server']}, user {user}")
    kind, reason = answer["kind"], answer.get("problem", NO_KEY)
    problem = f"W&B: {reason}"
    if mode == "online":
        error = StorageError(problem) if kind == "server" else ConfigError(problem)
        error.reported = not is_main()
        found.errors.append(error)
    elif kind == "none" and not given:
        say(f"W&B: offline, since {reason}")
    else:
        found.warnings.append(f"{problem}; the job would continue offline")
    return None


def ask_wandb() -> dict[str, Any]:
    """What job.tracking.key_check finds out; at once where there is no key that it could find."""
    homes = (Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc"))
    if not any(os.environ.get(name) for name in WANDB_KEYS) and not any(
        path.expanduser().exists() for path in homes
    ):
        return {"kind": "none"}
    program = Path(key_check.__file__)
    command = [sys.executable, "-P", str(program)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=WANDB_WAIT, check=True
        )
        return dict(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"kind": "server", "problem": f"it cannot be asked: {type(error).__name__}"}
