"""What a run needs before it starts: data, base network, a feasible plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.artifacts.records import PlannedRound
from job.data.loader import default_workers
from job.pipeline.slim_round import can_cut, plan_round
from job.processes import local_world_size
from job.slimming.surgery.surgery import apply_plan
from job.training.calibration import Calibration
from job.training.evaluation import Evaluator
from job.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.config import PruneConfig
    from job.data.dataset import Dataset
    from job.data.preprocessing import Preprocessing
    from job.distributed.stop import Watch

PLANNED = 10  # rounds of --rounds auto that are shown beforehand


def training_tools(
    config: PruneConfig,
    data: Dataset,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    least: int,
    watch: Watch,
) -> tuple[Evaluator, Trainer, Calibration]:
    """What evaluates, trains and calibrates the network of every round, with their loaders.

    A global batch has ``least`` images or more.
    """
    workers = config.workers
    if workers is None:
        workers = default_workers(local_world_size(), accelerator.device.type == "cuda")
    shared = (preprocessing, accelerator, workers)
    classes = config.num_classes or len(data.class_names)
    evaluator = Evaluator(data.splits["validation"], classes, *shared)
    training = data.splits["training"]
    trainer = Trainer(training, evaluator, config, *shared, least)
    return evaluator, trainer, Calibration(training, *shared, config.seed, watch)


def planned_rounds(config: PruneConfig, network: nn.Module, card: ModelCard) -> list[PlannedRound]:
    """Width and cost of the base and of every round; raises UsageError for what is out of reach.

    Of ``--rounds auto`` the first PLANNED, if as many can be cut. Exact for the uniform policy and
    for the metric of a target; else a forecast, by γ as it is.
    """
    assert card.base
    assert card.base.cost
    entries = [PlannedRound(0, card.width, **card.base.cost.to_dict())]
    last = config.last_round
    for round_ in range(1, (PLANNED if last is None else last) + 1):
        if last is None and round_ > 1 and not can_cut(config, network, card, round_):
            break
        plan = plan_round(config, network, card, round_)
        assert plan.after
        network, card = apply_plan(network, plan.layers), card.cut(plan.layers, plan.width)
        entries.append(PlannedRound(round_, card.width, **plan.after.to_dict()))
    return entries
