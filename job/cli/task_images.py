"""Items of a task for ``slim`` and ``sensitivity``: training items calibrate, validation scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.cli.evaluate_task import open_task_of
from job.cli.evaluation_images import loader_workers
from job.console import counted
from job.data.task_items import ItemSplit
from job.pipeline.task_data import agree_objective
from job.training.calibration import Calibration
from job.training.task_evaluation import TaskEvaluator

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions, SensitivityOptions, SlimOptions


@dataclass(frozen=True)
class TaskImages:
    """Calibration and evaluator on the items of a task, and the names of its metric and itself."""

    calibration: Calibration
    evaluator: TaskEvaluator
    metric: str
    task: str

    def describe(self) -> str:
        """Describe the scoring split, for the console."""
        count = counted(len(self.evaluator.split), "item")
        return f"the validation split of the task {self.task} ({count})"


def open_task_images(
    model: ModelOptions,
    options: SlimOptions | SensitivityOptions,
    card: ModelCard,
    network: nn.Module,
    accelerator: Accelerator,
    progress: Callable[[int, int], None] | None = None,
) -> TaskImages:
    """Open the items of the task that ``network`` was trained for; see `load_task` for errors."""
    task, dataset = open_task_of(model, options, card)
    objective = agree_objective(card.task, task, network)
    workers = loader_workers(options, accelerator.device)
    calibration = Calibration(
        dataset.splits["training"],
        card.preprocessing,
        accelerator,
        workers,
        options.seed,
        most=options.calibration_images,
        progress=progress,
        objective=objective,
    )
    scoring = dataset.splits["validation"]
    assert isinstance(scoring, ItemSplit)
    size = card.preprocessing.size
    evaluator = TaskEvaluator(scoring, objective, size, accelerator, workers)
    return TaskImages(calibration, evaluator, objective.metric, card.task)
