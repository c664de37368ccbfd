"""Build the task of a run, and describe its data as those of classification are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from job.config import DETECTION
from job.console import counted, say, say_cautions
from job.data.dataset import Dataset
from job.data.preprocessing import Preprocessing
from job.data.preprocessing_options import PreprocessingOptions
from job.distributed.collectives import on_main
from job.pipeline.base_model import slim_base_preprocessing
from job.processes import is_main
from job.tasks.coco import BACKGROUND, UNUSED
from job.tasks.image_task import TaskOptions
from job.tasks.loading import (
    TASKS,
    input_shape_of,
    load_task,
    split_of,
    try_own_objective,
    try_task,
)
from job.training.objective import TaskObjective

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from job.config import PruneConfig
    from job.training.objective import OwnObjective
    from job.training.task import Task

UNNAMED = (BACKGROUND, UNUSED)  # classes that no object has
LAYOUT = "task"  # in the table [dataset] of config.toml


def open_task(config: PruneConfig) -> tuple[Task, Dataset, Preprocessing]:
    """Return the task of ``--task``, its data set, and its preprocessing; collective.

    The main process builds a custom task first, e.g. to download its data, and the other processes
    build it afterwards. A built-in task is built on the main process only and sent to the others.
    Raises UsageError, InputNotFound or DataError.
    """
    built: list[Task] = []

    def build() -> Task:
        given = {
            "data": config.data,
            "image_size": config.image_size,
            "seed": config.seed,
            "options": image_options(config),
        }
        typed = [name for name in ("data", "image_size") if given[name] is not None]
        return load_task(config.task, given, typed)

    if config.task in TASKS:
        task = on_main(build, interrupt=True)
    else:
        on_main(lambda: built.append(build()), interrupt=True)
        task = built[0] if is_main() else build()
    data = task_dataset(config.task, task, config.data)
    shape: tuple[int, ...] = (3,)
    if not getattr(task, "preprocessing", None):
        shape = on_main(lambda: input_shape_of(config.task, task), interrupt=True)
    named = [name for name in data.class_names if name not in UNNAMED]
    counts = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
    classes = f", {counted(len(named), 'class')}" if named else ""
    preprocessing = task_preprocessing(task, shape)
    how = preprocessing.describe() if config.task in TASKS else f"inputs {shape}"
    how = "" if config.task == DETECTION else f"; {how}"
    say(f"data: task {config.task}: {counts}{classes}{how}")
    say_cautions([getattr(task, "caution", None)])
    return task, data, preprocessing


def image_options(config: PruneConfig) -> TaskOptions:
    """Return the options of a built-in task; they override the preprocessing of a slim base."""
    options, base = PreprocessingOptions.of(config), slim_base_preprocessing(config)
    options.check()
    how = options.override(base) if base else options
    return TaskOptions(config.data, how, config.on_bad_image, config.seed, config.cache_max_side)


def agree_objective(
    name: str, task: Any, network: nn.Module, *, distilled: bool = False
) -> OwnObjective:
    """Return the objective of a task that is tried on the main process; collective.

    Raises UsageError when loss or metrics fail, or with ``distilled`` the loss of distillation.
    """
    if name in TASKS and hasattr(task, "objective"):
        objective: OwnObjective = task.objective(network)
        on_main(lambda: try_own_objective(name, task, objective, network), interrupt=True)
        return objective

    def try_it() -> tuple[Mapping[str, int], tuple[str, ...]]:
        tried = try_task(name, task, network, distilled=distilled)
        return tried.layout, tried.names

    return TaskObjective(task, *on_main(try_it, interrupt=True))


def task_dataset(name: str, task: Task, path: str | None) -> Dataset:
    """Return the data of a task as a data set; ``path`` is the value of --data."""
    splits = {
        split: split_of(task, name, getattr(task, split))
        for split in ("training", "validation", "testing")
        if getattr(task, split, None) is not None
    }
    class_names = tuple(map(str, getattr(task, "class_names", ())))
    return Dataset(f"task {name}", class_names, splits, layout=LAYOUT, source=path or "")


def task_preprocessing(task: Any, shape: tuple[int, ...]) -> Preprocessing:
    """Return the preprocessing that a task declares, or the size of its inputs of ``shape``.

    The size of inputs that are no square RGB images is the side of a square with as many pixels.
    """
    if declared := getattr(task, "preprocessing", None):
        return declared  # type: ignore[no-any-return]
    side = math.isqrt(math.prod(shape[1:])) or 1
    square = shape == (3, side, side)
    return replace(Preprocessing.of("small", side), shape=None if square else shape)
