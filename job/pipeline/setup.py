"""Start-up: prepare everything that a run needs, as one list of steps.

`start_up` runs the steps in order and stops at the first error. ``--dry-run`` runs the same
steps and collects their errors: see `job.pipeline.dry_run`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from job.artifacts.records import PlannedRound
from job.artifacts.run_directory import Run
from job.artifacts.run_folder import choose_run_folder, likely_run_folder
from job.config import CLASSIFICATION, DETECTION
from job.console import say_cautions, tick
from job.data.cache.cached_split import ImageCache
from job.data.cache.image_set import ImageSet
from job.data.loader import default_workers
from job.data.task_items import ItemSplit
from job.distributed.collectives import on_main, start
from job.distributed.memory import free_memory
from job.distributed.stop import Watch
from job.errors import UsageError
from job.models.custom_network import trust_factory
from job.pipeline.base_model import (
    BaseWeights,
    adopt_slim_base,
    base_record,
    build_base_network,
    load_teacher_network,
    read_base_weights,
)
from job.pipeline.model import Model
from job.pipeline.slim_round import plan_round
from job.pipeline.task_data import agree_objective, open_task
from job.pipeline.training_data import SPLITS, dataset_record, prepare_data
from job.processes import local_world_size
from job.slimming.surgery.surgery import apply_plan
from job.tracking.scalar_tracker import check_trackers
from job.training.calibration import Calibration
from job.training.epoch import ACCURACY
from job.training.evaluation import Evaluator
from job.training.task_evaluation import TaskEvaluator
from job.training.trainer import Trainer
from job.training.trial import batch_for_processes, least_batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.artifacts.records import BaseRecord, DatasetRecord
    from job.config import PruneConfig
    from job.data.dataset import Dataset
    from job.data.preprocessing import Preprocessing
    from job.training.objective import OwnObjective
    from job.training.task import Task

MISSING: Any = object()  # the value of a field whose step has not run, or has failed
PLANNED = 10  # rounds of --rounds auto that are planned in advance


@dataclass(frozen=True)
class Setup:
    """The parts of a run. The steps of START_UP set the fields that are MISSING at first."""

    config: PruneConfig
    accelerator: Accelerator
    watch: Watch
    folder: Path  # the run directory
    folder_reason: str = ""  # why another folder than the default is used
    model_folder: Path | None = MISSING  # of the slim model that --weights names
    data: Dataset = MISSING
    task: Task | None = None  # None for classification
    preprocessing: Preprocessing = MISSING
    weights: BaseWeights = MISSING
    network: nn.Module = MISSING  # the base
    card: ModelCard = MISSING
    smallest_batch: int = MISSING  # least number of images in a global batch
    planned: tuple[PlannedRound, ...] = MISSING  # the base and each round
    teacher: nn.Module | None = MISSING
    dataset_record: DatasetRecord = MISSING
    base_record: BaseRecord = MISSING
    objective: OwnObjective | None = MISSING  # None for classification
    cache: ImageCache = MISSING  # of decoded images; a run fills it before the first epoch
    evaluator: Evaluator | TaskEvaluator = MISSING
    trainer: Trainer = MISSING
    calibration: Calibration = MISSING

    @property
    def metric(self) -> str:
        """Name of the metric that chooses models, as in the keys of records."""
        return self.objective.metric if self.objective else ACCURACY


@dataclass(frozen=True)
class StartUpStep:
    """A start-up step: returns the setup with more fields; ``needs`` are the fields it reads.

    Collective. Raises GammaslimError.
    """

    run: Callable[[Setup], Setup]
    needs: tuple[str, ...] = ()

    def can_run(self, setup: Setup) -> bool:
        """Return whether earlier steps have set the fields that it needs."""
        return all(getattr(setup, name) is not MISSING for name in self.needs)


def configure(config: PruneConfig) -> Setup:
    """Join the other processes, and start to watch for stop requests."""
    check_trackers(config.tracker)
    folder = likely_run_folder(config)
    watch = Watch(folder / "STOP", config.checkpoint_every)
    return Setup(config, start(config.device, config.precision), watch, folder)


def start_up(setup: Setup) -> Setup:
    """Run every step; raise the first GammaslimError, or StopRequest."""
    for step in START_UP:
        setup = step.run(setup)
    say_cautions(setup.config.cautions)
    setup.watch.check()
    free_memory()  # the steps try the network and its cuts on copies
    return setup


def adopt_model_folder(setup: Setup) -> Setup:
    """Adopt the network and the data of the model folder that ``--weights`` names, if any."""
    if ":" in setup.config.model:  # the model card may then name it too
        trust_factory(setup.config.model)
    config, model_folder = on_main(lambda: adopt_slim_base(setup.config), interrupt=True)
    folder = on_main(lambda: likely_run_folder(config))
    setup.watch.follow(folder / "STOP")
    return replace(setup, config=config, folder=folder, model_folder=model_folder)


def open_dataset(setup: Setup) -> Setup:
    """Open the data set and check its images, or build the task with its data."""
    if setup.config.task != CLASSIFICATION:
        task, data, preprocessing = open_task(setup.config)
        return replace(setup, task=task, data=data, preprocessing=preprocessing)
    data, preprocessing = prepare_data(setup.config, setup.watch.check_here, setup.folder)
    return replace(setup, data=data, preprocessing=preprocessing)


def read_weights(setup: Setup) -> Setup:
    """Read ``--weights`` on the main process; the others receive the network later."""
    read: list[BaseWeights] = []
    on_main(lambda: read.append(read_base_weights(setup.config)), interrupt=True)
    return replace(setup, weights=read[0] if read else BaseWeights())


def build_base(setup: Setup) -> Setup:
    """Build the base network, with its weights if there are any."""
    torch.manual_seed(setup.config.seed)
    built = setup.config, setup.data, setup.preprocessing, setup.weights
    network, card = on_main(lambda: build_base_network(*built), interrupt=True)
    made = card.preprocessing  # a detector has its own
    return replace(setup, network=network, card=card, preprocessing=made, weights=BaseWeights())


def try_objective(setup: Setup) -> Setup:
    """Try loss and metrics of a task on the network."""
    name, task, network = setup.config.task, setup.task, setup.network
    if task is None:
        return replace(setup, objective=None)
    distilled = bool(setup.config.distill_alpha)
    if distilled and not hasattr(task, "distillation_loss"):
        raise UsageError(f"--distill-alpha needs distillation_loss() in --task {name}")
    return replace(setup, objective=agree_objective(name, task, network, distilled=distilled))


def find_smallest_batch(setup: Setup) -> Setup:
    """Find the smallest global batch that the network's BatchNorms allow."""
    count, size = len(setup.data.splits["training"]), setup.preprocessing.input_size
    least = on_main(lambda: least_batch(setup.network, setup.config, size, count))
    if setup.config.task == DETECTION:  # torchvision's detectors take no empty batch
        least = max(least, batch_for_processes(setup.config, count))
    return replace(setup, smallest_batch=least)


def plan_rounds(setup: Setup) -> Setup:
    """Plan every round; raises UsageError for a target that is out of reach."""
    base = Model(setup.network, setup.card)
    planned = on_main(lambda: planned_rounds(setup.config, base), interrupt=True)
    return replace(setup, planned=tuple(planned))


def load_teacher(setup: Setup) -> Setup:
    """Load the network of ``--teacher``, if any."""
    teacher = on_main(lambda: load_teacher_network(setup.config, setup.card), interrupt=True)
    return replace(setup, teacher=teacher)


def choose_folder(setup: Setup) -> Setup:
    """Choose the run directory; an existing run in it must be resumable by this job."""
    config, max_side = setup.config, setup.preprocessing.max_side
    dataset = on_main(lambda: dataset_record(setup.data, max_side))
    base = base_record(config, setup.card, setup.teacher)

    def chosen() -> tuple[Path, str]:
        folder, reason = choose_run_folder(config, dataset, base)
        if config.output:  # else it was chosen because its run can be resumed
            Run(folder).check(config, dataset, base)
        return folder, reason

    folder, reason = on_main(chosen)
    setup.watch.follow(folder / "STOP")
    return replace(
        setup, folder=folder, folder_reason=reason, dataset_record=dataset, base_record=base
    )


def build_tools(setup: Setup) -> Setup:
    """Build the evaluator, the trainer and the calibration data, with their loaders."""
    config, accelerator = setup.config, setup.accelerator
    workers = config.workers
    if workers is None:
        workers = default_workers(local_world_size(), accelerator.device.type == "cuda")
    shared = setup.preprocessing, accelerator, workers
    objective, size = setup.objective, setup.preprocessing.size
    images = None if objective else ImageSet.of(setup.data, SPLITS, setup.preprocessing.max_side)
    cache = ImageCache(images)
    training, validation = (cache.over(setup.data.splits[name]) for name in SPLITS)
    evaluator: Evaluator | TaskEvaluator
    if objective:
        assert isinstance(validation, ItemSplit)
        evaluator = TaskEvaluator(validation, objective, size, accelerator, workers)
    else:
        evaluator = Evaluator(validation, setup.card.num_classes, *shared)
    return replace(
        setup,
        cache=cache,
        evaluator=evaluator,
        trainer=Trainer(training, evaluator, config, *shared, setup.smallest_batch, objective),
        calibration=Calibration(
            training,
            *shared,
            config.seed,
            setup.watch,
            # a trial takes one batch
            most=config.batch_size if config.dry_run else config.calibration_images,
            progress=None if config.dry_run else tick,
            objective=objective,
        ),
    )


START_UP = (
    StartUpStep(adopt_model_folder),
    StartUpStep(open_dataset, needs=("model_folder",)),
    StartUpStep(read_weights, needs=("model_folder",)),
    StartUpStep(build_base, needs=("data", "weights")),
    StartUpStep(try_objective, needs=("network",)),
    StartUpStep(find_smallest_batch, needs=("network",)),
    StartUpStep(plan_rounds, needs=("network",)),
    StartUpStep(load_teacher, needs=("card",)),
    StartUpStep(choose_folder, needs=("card", "teacher")),
    StartUpStep(build_tools, needs=("card", "smallest_batch", "objective")),
)


def planned_rounds(config: PruneConfig, model: Model) -> list[PlannedRound]:
    """Return the width and costs of the base, ``model``, and of every round.

    With ``--rounds auto`` these are the first PLANNED rounds at most. The values are exact for the
    uniform policy and for the metric of a target, otherwise a forecast from the current γ. Raises
    UsageError for a target that is out of reach.
    """
    assert model.card.base
    assert model.card.base.cost
    planned = [PlannedRound(0, model.card.width, **model.card.base.cost.to_dict())]
    last = config.last_round
    for round_index in range(1, (PLANNED if last is None else last) + 1):
        try:
            plan = plan_round(config, model, round_index)
        except UsageError:
            if last is None and round_index > 1:  # nothing more can be cut
                break
            raise
        assert plan.after
        card = model.card.cut(plan.layers, plan.width)
        model = Model(apply_plan(model.network, plan.layers), card)
        planned.append(PlannedRound(round_index, card.width, **plan.after.to_dict()))
    return planned
