"""The cut of a round: planned on the main process, applied and verified on every process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from job.config import output_loss_of
from job.distributed.collectives import digest, on_main
from job.errors import DataError, UsageError, shown
from job.pipeline.model import Model
from job.slimming.calibration.input_statistics import CalibrationData
from job.slimming.calibration.progress import no_progress
from job.slimming.compensation.methods import data_of_compensation
from job.slimming.compensation.recalibration import recalibrate_batchnorms
from job.slimming.cut import make_cut, measure_importance, measure_losses
from job.slimming.importance.criteria import CRITERIA, score_channels
from job.slimming.method import Method, choose_allocation, choose_depth
from job.slimming.planned_cut import plan_cut
from job.slimming.planning.allocation import Allocation
from job.slimming.planning.base import Base, layer_widths
from job.slimming.planning.cost import example_image, network_cost
from job.slimming.planning.plan import keep_of
from job.slimming.planning.policies import POLICIES
from job.slimming.planning.target import Budget
from job.slimming.proven_plan import prove_plan
from job.slimming.recovery.recovery import recover
from job.slimming.sensitivity.measure import FRACTIONS
from job.slimming.sensitivity.summary import summarise_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.config import PruneConfig
    from job.slimming.calibration.progress import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.planning.loss_curves import LossCurve
    from job.slimming.planning.plan import Plan
    from job.slimming.recovery.recovery import Recovered
    from job.training.calibration import Calibration
    from job.training.checkpoint_content import Position

MAX_STEPS = 2**14  # of --rate in the search for a cut: 0.999 to this power is 8e-8


def allocation_of(
    config: PruneConfig, card: ModelCard, round_index: int, steps: int = 1
) -> Allocation:
    """Return the allocation of a round: the target, spread over the rounds.

    Without a target, a policy by width multiplies the current width by --rate to the power
    ``steps``. Other policies keep --rate to the power ``round_index + steps - 1`` of the channels
    of the base. Raises UsageError for a target above the value of the base.
    """
    assert card.base
    assert card.base.cost
    if config.target:
        assert config.last_round is not None
        budget = Budget.parse(config.target)
        if budget.metric == "latency":
            share, batch = round_index / config.last_round, config.latency_batch
            bounds = config.round_to, config.min_keep
            return Allocation(config.cut_policy, budget, *bounds, latency_batch=batch, share=share)
        budget = budget.spread(round_index, config.last_round, card.base.cost)
    elif POLICIES[config.cut_policy].by_width:
        budget = Budget("width", card.width * config.rate**steps, f"--rate {config.rate:g}")
    else:
        remaining = config.rate ** (round_index + steps - 1)
        budget = Budget("channels", remaining, f"--rate {config.rate:g}")
    return Allocation(config.cut_policy, budget, config.round_to, config.min_keep)


def base_of(network: nn.Module, card: ModelCard) -> Base:
    """Return the base of a run: ``network`` before the first round."""
    return Base(layer_widths(network), network_cost(network, card.preprocessing.input_size))


def ranking_norms(model: Model, sparse_epochs: int) -> list[str] | None:
    """Return the names of the BatchNorms that rank channels; None without sparse training."""
    if not sparse_epochs:
        return None
    return sorted({norm for group in model.graph.groups for norm in group.norms})


def method_of(config: PruneConfig) -> Method:
    """Return the importance, compensation and allocation of a run."""
    allocate = choose_allocation(config.allocate, config.compensate, config.cut_policy)
    depth = choose_depth(config.depth, allocate)
    loss = output_loss_of(config.task)
    return Method(config.importance, config.compensate, config.seed, allocate, depth, loss)


def plan_round(config: PruneConfig, model: Model, round_index: int) -> Plan:
    """Return a forecast of a round's plan, made without calibration images.

    Only the cut itself measures latency. The forecast therefore replaces a latency target by the
    same fraction of the MACs, or by half of the MACs if the target is in seconds. Channels are
    ranked by gamma when the importance criterion needs images. Raises UsageError for a target that
    is out of reach.
    """
    if config.target and Budget.parse(config.target).metric == "latency":
        config = replace(config, target=_macs_instead(config, model, round_index))
    importance = "gamma" if CRITERIA[config.importance].images else config.importance
    scores = score_channels(importance, model.network, model.graph, CalibrationData(), config.seed)
    return _plan_by_scores(config, model, model.graph, round_index, scores)


def _macs_instead(config: PruneConfig, model: Model, round_index: int) -> str:
    """Return the MACs target that replaces a latency target in a forecast."""
    budget = Budget.parse(str(config.target))
    assert config.last_round is not None
    assert model.card.base
    assert model.card.base.cost
    share = round_index / config.last_round
    left = (0.5 if budget.absolute else budget.value) ** share
    now = network_cost(model.network, model.card.preprocessing.input_size).macs
    left = min(left, now / model.card.base.cost.macs) ** (1 / share)
    return f"macs={left:.6g}"


def _plan_by_scores(
    config: PruneConfig,
    model: Model,
    graph: ChannelGraph,
    round_index: int,
    scores: Scores,
    curves: Mapping[str, LossCurve] | None = None,
    timed_base: nn.Module | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """Return the plan of a round; with --rounds auto, the first plan that cuts anything."""
    image = example_image(model.card.preprocessing.input_size)

    def plan_after(steps: int) -> Plan:
        allocation = allocation_of(config, model.card, round_index, steps)
        parts = model.network, graph, scores, allocation, method_of(config), image
        return plan_cut(*parts, model.card.base, curves, timed_base, progress)

    return plan_after(1) if config.last_round is not None else _first_cut(plan_after)


def _first_cut(plan_after: Callable[[int], Plan]) -> Plan:
    """Return the plan of the fewest steps of --rate that cut anything, or raise UsageError."""
    error = UsageError("nothing more can be cut")

    def attempt(steps: int) -> Plan | None:
        """Return the plan, or None when ``steps`` are out of reach."""
        nonlocal error
        try:
            return plan_after(steps)
        except UsageError as reason:
            error = reason
            return None

    def cuts(plan: Plan | None) -> bool:
        return plan is None or plan.after != plan.before

    low, high = 0, 1
    while not cuts(attempt(high)) and high < MAX_STEPS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if cuts(attempt(middle)):
            high = middle
        else:
            low = middle
    plan = attempt(high)
    if plan is None or plan.after == plan.before:
        raise error
    return plan


def can_cut(config: PruneConfig, model: Model, round_index: int) -> bool:
    """Return whether a round can make the network narrower."""
    try:
        plan_round(config, model, round_index)
    except UsageError:
        return False
    return True


def cut(
    model: Model,
    round_index: int,
    config: PruneConfig,
    device: torch.device,
    calibration: Calibration,
    progress: Progress = no_progress,
    base: nn.Module | None = None,
) -> tuple[Model, Plan]:
    """Return the narrow network of a round, on the CPU, with its card, and its plan with the proof.

    A latency target is a fraction of the latency of ``base``, by default the network of ``model``.
    ``progress`` is called before each step. Raises StopRequest on every process when a stop is
    requested.
    """
    step, network = _interruptible(calibration, progress), model.network
    card, method = model.card, method_of(config)
    image = example_image(card.preprocessing.input_size)
    network.to(device)
    step("tracing the network", 0, 0)
    graph = on_main(lambda: model.graph, interrupt=True)
    scores, data = measure_importance(network, graph, method, calibration.batches, step)
    curves = measure_losses(network, graph, scores, method, data, image, step)
    data = data_of_compensation(method.compensate, data)

    def plan_of(own: ChannelGraph) -> Plan:
        return _plan_by_scores(config, model, own, round_index, scores, curves, base, progress)

    planned = partial(prove_plan, plan_of, network, graph, image, progress)
    proven = on_main(planned, interrupt=True)
    plan, graph, _ = proven
    sensitivity = None
    if curves:
        summarise = partial(summarise_losses, network, graph, curves, FRACTIONS, plan)
        sensitivity = on_main(summarise)
    narrow = make_cut(proven, network, image, method.compensate, data, step)
    if config.recalibrate:
        step("recalibrating", 0, 0)
        images = config.recalibrate * config.batch_size
        recalibrate_batchnorms(narrow, calibration.batches(images))
    lineage = replace(card.lineage, wide_sha256=digest(network.cpu().state_dict()))
    card = replace(card.cut(plan.layers, plan.width), lineage=lineage)
    return Model(narrow.cpu(), card, sensitivity), plan


def recover_cut(
    wide: Model,
    narrow: Model,
    plan: Plan,
    config: PruneConfig,
    device: torch.device,
    calibration: Calibration,
    progress: Progress = no_progress,
) -> Recovered:
    """Train the narrow network to reproduce the wide one, without labels, for --recover epochs.

    Both networks are on the CPU afterwards. Raises StopRequest as `cut` does.
    """
    graph = on_main(lambda: wide.graph, interrupt=True)
    recovered = recover(
        wide.network.to(device),
        narrow.network.to(device),
        graph,
        keep_of(graph, plan.groups),
        calibration.batches,
        config.recover,
        config.seed,
        _interruptible(calibration, progress),
    )
    wide.network.cpu()
    narrow.network.cpu()
    return recovered


def _interruptible(calibration: Calibration, progress: Progress) -> Progress:
    """Return ``progress`` that raises StopRequest on every process when a stop is requested."""

    def step(name: str, number: int, count: int) -> None:
        calibration.check()
        progress(name, number, count)

    return step


def rebuild_cut(model: Model, start: Position, run: Path) -> Model:
    """Repeat the cut of ``model`` that an earlier attempt made, without its trained weights.

    The position ``start`` holds the weights. Raises DataError when it belongs to another network.
    """
    plan = start.progress.plan
    if plan.wide != digest(model.network.cpu().state_dict()):
        raise DataError(
            f"checkpoint {start.name} was cut from another model than {shown(run)} has in rounds/: "
            "restore that model, or remove the checkpoints to repeat the round"
        )
    lineage = replace(model.card.lineage, wide_sha256=plan.wide)
    card = replace(model.card, layers=dict(plan.layers), width=plan.width, lineage=lineage)
    return Model(card.build(), card, start.progress.sensitivity)
