"""``--dry-run``: find everything that would stop or slow a run, before it is queued.

Runs the start-up steps and collects their errors. Then tries an evaluation batch, a training step,
every cut, the storage and W&B.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from job.artifacts.run_directory import Run
from job.console import counted, print_error, say, warn
from job.distributed.collectives import on_main
from job.errors import GammaslimError, StopRequest, shown
from job.files import check_writable, is_file
from job.pipeline.cautions import sample_caution
from job.pipeline.image_cache import forecast_cache
from job.pipeline.model import Model
from job.pipeline.resources import batch_warnings, check_disk, core_warnings
from job.pipeline.round import distil_from
from job.pipeline.setup import MISSING, PLANNED, START_UP
from job.pipeline.slim_round import cut, recover_cut
from job.pipeline.wandb_check import check_wandb
from job.processes import is_main, world_size
from job.report.tables import rounds_table
from job.training.evaluation import Evaluator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from job.config import PruneConfig
    from job.pipeline.setup import Setup

_T = TypeVar("_T")


class Findings:
    """Errors and warnings found so far: equal on all processes, printed by the main one."""

    def __init__(self) -> None:
        self.errors: list[GammaslimError] = []
        self.warnings: list[str] = []

    def attempt(self, work: Callable[[], _T]) -> _T | None:
        """Run collective ``work``; if it fails, record the error and return None."""
        try:
            return work()
        except StopRequest:
            raise
        except GammaslimError as error:
            self.errors.append(error)
        return None

    def conclude(self) -> None:
        """Print all findings; raise the first error, which determines the exit code."""
        if is_main():
            for warning in self.warnings:
                warn(warning)
            for error in self.errors[1:]:
                print_error(str(error))
        if self.errors:
            raise self.errors[0]


def dry_run(setup: Setup) -> None:
    """Check everything that a run needs, and try each part once; write nothing. Collective.

    Raises the first GammaslimError found.
    """
    findings = Findings()
    for step in START_UP:
        if step.can_run(setup):
            setup = findings.attempt(partial(step.run, setup)) or setup
    config, folder, planned = setup.config, setup.folder, setup.planned
    findings.warnings += _warnings(setup)
    if not findings.errors:
        caution = findings.attempt(lambda: _try_training(setup))
        findings.warnings += [caution] if caution else []
    findings.attempt(lambda: on_main(lambda: check_writable(folder)))
    if planned is not MISSING:
        findings.attempt(lambda: on_main(lambda: check_disk(config, planned, folder)))
    if setup.cache is not MISSING:
        findings.attempt(lambda: on_main(lambda: forecast_cache(setup)))
    fallback = findings.attempt(lambda: on_main(lambda: check_wandb(config.wandb_mode)))
    findings.warnings += [fallback] if fallback else []
    if not findings.errors:
        _show_plan(setup)
    findings.conclude()


def _warnings(setup: Setup) -> list[str]:
    """Return warnings about slow or doubtful settings, from the results of the steps."""
    config = setup.config
    found = config.cautions
    if setup.data is MISSING:
        return found
    least = 1 if setup.smallest_batch is MISSING else setup.smallest_batch
    count = len(setup.data.splits["training"])
    found += core_warnings(config, setup.data, setup.accelerator.device.type == "cuda")
    return found + batch_warnings(config.batch_size, count, world_size(), least)


def _try_training(setup: Setup) -> str | None:
    """Evaluate one batch; for the base and each planned round, cut and take one training step.

    Cuts use one batch of calibration images. Returns a caution when the weights score low. Raises
    the errors that the run would raise.
    """
    model, config = Model(setup.network, setup.card), setup.config
    setup.evaluator.try_batch(model.network)
    caution = None
    whole = config.weights and not model.card.lineage.fresh_classifier
    if whole and isinstance(setup.evaluator, Evaluator):
        caution = sample_caution(setup.evaluator, model.network)
    distillation = distil_from(setup, setup.teacher or model.network)
    rounds = len(setup.planned) - 1
    for round_index in range(rounds + 1):
        setup.watch.check()
        if round_index:
            tools = config, setup.accelerator.device, setup.calibration
            wide = model
            model, plan = cut(wide, round_index, *tools, base=setup.network)
            if config.recover:
                recover_cut(wide, model, plan, *tools)
        # a compilation takes a minute: that of the base shows that it works
        setup.trainer.try_step(model.network, distillation, compiled=not round_index)
    cuts = f", the cuts of {counted(rounds, 'round')}" if rounds else ""
    say(f"tried: an evaluation batch, a training step{cuts}")
    return caution


def _show_plan(setup: Setup) -> None:
    """Print the folder, the epochs of training, and the planned rounds."""
    config, folder, planned = setup.config, setup.folder, setup.planned
    if setup.folder_reason:
        say(f"output: {shown(folder)}, as {setup.folder_reason}")
    stored_epochs = on_main(lambda: Run(folder).base_epochs)
    epochs = config.first_epochs if stored_epochs is None else stored_epochs
    trained = f"{counted(epochs, 'epoch')} of base training"
    if config.sparsity_epochs:
        trained += f", {config.sparsity_epochs} with {config.sparsity} on γ"
    say(f"output: {shown(folder)} can be written{on_main(lambda: _resumed(folder))}")
    say(f"plan: {trained}, then {_rounds_text(config)}")
    say(rounds_table(planned))
    if config.last_round is None:
        more = len(planned) > PLANNED
        say("…" if more else "then nothing more can be cut (a forecast)")
    say("dry run: all is well, nothing was trained")


def _rounds_text(config: PruneConfig) -> str:
    if config.last_round is not None:
        return f"{counted(config.last_round, 'round')} of {counted(config.epochs, 'epoch')}"
    points = "point" if config.most_points_lost == 1 else "points"
    return (
        f"rounds of {counted(config.epochs, 'epoch')} until one is more than "
        f"{config.most_points_lost:g} {points} below the base, or nothing more can be cut"
    )


def _resumed(folder: Path) -> str:
    """Return the saved progress of the run, as the end of a sentence."""
    if not is_file(folder / "config.toml"):
        return ""
    if not (saved := Run(folder).saved):
        return "; a run that has not finished its base is resumed"
    return f"; its run is resumed: the base and {counted(saved - 1, 'round')} are saved"
