"""One cut of the main job: decided on the main process, made on every one, proven."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from job.distributed.collectives import digest, on_main
from job.errors import DataError, UsageError, shown
from job.slimming.analysis import analyse
from job.slimming.calibrated import scores_for
from job.slimming.compensation.recalibration import recalibrate
from job.slimming.compensation.regression import quiet
from job.slimming.cut import Method, make_cut, plan_cut
from job.slimming.planning.allocation import Allocation
from job.slimming.planning.base import Base, layer_widths
from job.slimming.planning.cost import example_image, network_cost
from job.slimming.planning.target import Budget

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.config import PruneConfig
    from job.slimming.compensation.regression import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.planning.plan import Plan
    from job.training.calibration import Calibration
    from job.training.position import Position

MOST_STEPS = 2**14  # of --rate, in search of one that cuts: 0.999 to this power is 8e-8


def allocation_of(config: PruneConfig, card: ModelCard, round_: int, power: int = 1) -> Allocation:
    """What round ``round_`` of a run is to leave: the target is spread over the rounds.

    Without a target ``--rate`` of the width, or of the channels of a global policy; its
    ``power``-th power for as many steps at a time. Raises UsageError for a target above what the
    base has.
    """
    assert card.base
    assert card.base.cost
    if config.target:
        assert config.last_round is not None
        budget = Budget.parse(config.target).spread(round_, config.last_round, card.base.cost)
    elif config.policy == "uniform":
        budget = Budget("width", card.width * config.rate**power, f"--rate {config.rate:g}")
    else:
        budget = Budget("channels", config.rate ** (round_ + power - 1), f"--rate {config.rate:g}")
    return Allocation(config.policy, budget, config.round_to, config.min_keep)


def base_of(network: nn.Module, card: ModelCard) -> Base:
    """What a run's fractions are of: ``network`` as it is before the first round."""
    return Base(layer_widths(network), network_cost(network, card.preprocessing.size))


def ranking_norms(network: nn.Module, size: int, sparse_epochs: int) -> list[str] | None:
    """BatchNorms whose γ may decide a cut, for sparse training; None where there is none of it."""
    if not sparse_epochs:
        return None
    graph = analyse(network, example_image(size))
    return sorted({norm for group in graph.groups for norm in group.norms})


def plan_round(
    config: PruneConfig,
    network: nn.Module,
    card: ModelCard,
    round_: int,
    graph: ChannelGraph | None = None,
    scores: Scores | None = None,
) -> Plan:
    """Which channels round ``round_`` keeps; raises UsageError when its target is out of reach.

    By default as an importance that needs no pictures has it: a forecast of the others.
    """
    image = example_image(card.preprocessing.size)
    if graph is None:
        graph = analyse(network, image)
    if scores is None:
        known: Any = config.importance if config.importance in ("l2", "random") else "gamma"
        scores = scores_for(known, network, graph, {}, seed=config.seed)

    def plan_of(power: int) -> Plan:
        allocation = allocation_of(config, card, round_, power)
        return plan_cut(network, graph, scores, allocation, config.compensate, image, card.base)

    return plan_of(1) if config.last_round is not None else _first_cut(plan_of)


def _first_cut(plan_of: Callable[[int], Plan]) -> Plan:
    """The plan of the lowest power of --rate that cuts anything; raises UsageError for none."""
    error = UsageError("nothing more can be cut")

    def tried(power: int) -> Plan | None:
        """None where nothing is left to be cut that far."""
        nonlocal error
        try:
            return plan_of(power)
        except UsageError as reason:
            error = reason
            return None

    def cuts(plan: Plan | None) -> bool:
        return plan is None or plan.after != plan.before

    low, high = 0, 1
    while not cuts(plan := tried(high)) and high < MOST_STEPS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if cuts(tried(middle)):
            high = middle
        else:
            low = middle
    plan = tried(high)
    if plan is None or plan.after == plan.before:
        raise error
    return plan


def can_cut(config: PruneConfig, network: nn.Module, card: ModelCard, round_: int) -> bool:
    """Whether round ``round_`` can be any narrower than ``network``."""
    try:
        plan_round(config, network, card, round_)
    except UsageError:
        return False
    return True


def cut(
    network: nn.Module,
    card: ModelCard,
    round_: int,
    config: PruneConfig,
    device: torch.device,
    calibration: Calibration,
    progress: Progress = quiet,
) -> tuple[nn.Module, ModelCard, float]:
    """The narrow network of round ``round_``, on the CPU, its card, and the proof's error."""
    image = example_image(card.preprocessing.size)
    network.to(device)
    progress("following channels", 0, 0)
    graph = on_main(lambda: analyse(network, image), interrupt=True)
    narrow, plan, error = make_cut(
        network,
        graph,
        image,
        Method(config.importance, config.compensate, config.seed),
        lambda scores: plan_round(config, network, card, round_, graph, scores),
        calibration.batches,
        calibration.check,
        progress,
    )
    if config.recalibrate:
        progress("recalibrating", 0, 0)
        recalibrate(narrow, calibration.batches(config.recalibrate * config.batch_size))
    lineage = card.lineage | {"wide_sha256": digest(network.cpu().state_dict())}
    return narrow.cpu(), replace(card.cut(plan.layers, plan.width), lineage=lineage), error


def cut_before(
    network: nn.Module, card: ModelCard, start: Position, run: Path
) -> tuple[nn.Module, ModelCard]:
    """The cut that an earlier attempt made of ``network``; its weights come with the position.

    Raises DataError when it was another network that was cut.
    """
    plan = start.progress.plan
    if plan.wide != digest(network.cpu().state_dict()):
        raise DataError(
            f"checkpoint {start.name} was cut from another model than {shown(run)} has in rounds/: "
            "restore that model, or remove the checkpoints to repeat the round"
        )
    lineage = card.lineage | {"wide_sha256": plan.wide}
    card = replace(card, layers=dict(plan.layers), width=plan.width, lineage=lineage)
    return card.build(), card
