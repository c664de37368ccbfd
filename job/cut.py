"""One cut of the main job: decided on the main process, made on every one, proven."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from job.errors import DataError, shown
from job.processes import check_same, digest, on_main
from job.slimming.budget import Budget
from job.slimming.calibrated import compensated, measured, scores_for
from job.slimming.compensation import with_biases, without_constant
from job.slimming.cost import network_cost, picture
from job.slimming.engine import Base, Slimming, analyse, layer_widths, make_plan
from job.slimming.plan import LayerChannels, keep_of
from job.slimming.recalibration import recalibrate
from job.slimming.surgery import narrowed
from job.slimming.verification import verify

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from job.artifact import ModelCard
    from job.checkpoint import Position
    from job.config import PruneConfig
    from job.slimming.graph import ChannelGraph
    from job.slimming.importance import Scores
    from job.slimming.plan import Plan
    from job.training.calibration import Calibration


def slimming_of(config: PruneConfig, card: ModelCard, round_: int) -> Slimming:
    """What round ``round_`` of a run is to leave: the target is spread over the rounds.

    Without a target ``--rate`` of the width, or of the channels of a global policy. Raises
    UsageError for a target above what the base has.
    """
    assert card.base
    assert card.base.cost
    if config.target:
        budget = Budget.parse(config.target).spread(round_, config.rounds, card.base.cost)
    elif config.policy == "uniform":
        budget = Budget("width", card.width * config.rate)
    else:
        budget = Budget("channels", config.rate**round_)
    return Slimming(config.policy, budget, config.round_to, config.min_keep)


def base_of(network: nn.Module, card: ModelCard) -> Base:
    """What a run's fractions are of: ``network`` as it is before the first round."""
    return Base(layer_widths(network), network_cost(network, card.preprocessing.size))


def ranking_norms(network: nn.Module, size: int, sparse_epochs: int) -> list[str] | None:
    """BatchNorms whose γ may decide a cut, for sparse training; None where there is none of it."""
    if not sparse_epochs:
        return None
    graph = analyse(network, picture(size))
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
    if graph is None:
        graph = analyse(network, picture(card.preprocessing.size))
    if scores is None:
        known: Any = config.importance if config.importance in ("l2", "random") else "gamma"
        scores = scores_for(known, network, graph, {}, seed=config.seed)
    bare: frozenset[str] = frozenset()
    if config.compensate != "none":
        bare = without_constant(network, graph, picture(card.preprocessing.size))
    slimming = slimming_of(config, card, round_)
    plan = make_plan(network, graph, scores, slimming, card.base, bare)
    return replace(plan, layers=with_biases(plan.layers, bare))


def cut(
    network: nn.Module,
    card: ModelCard,
    round_: int,
    config: PruneConfig,
    device: torch.device,
    calibration: Calibration,
) -> tuple[nn.Module, ModelCard, float]:
    """The narrow network of round ``round_``, on the CPU, its card, and the proof's error.

    Moments are of all processes; the main one decides; all cut, and compare what they have.
    """
    image = picture(card.preprocessing.size)
    graph = on_main(lambda: analyse(network.cpu(), image), interrupt=True)
    network.to(device)
    moments = measured(config.importance, config.compensate, network, graph, calibration.batches)
    scores = scores_for(
        config.importance, network, graph, moments, calibration.batches, config.seed
    )
    network.cpu()
    plan = on_main(lambda: plan_round(config, network, card, round_, graph, scores))
    layers = plan.layers
    narrow = narrowed(network, layers)
    check_same(digest(narrow.state_dict()), "the slimmed network")
    error = on_main(
        lambda: verify(network, narrow, layers, image, auxiliary=graph.auxiliary), interrupt=True
    )
    keep = keep_of(graph, plan.groups)
    network.to(device)
    narrow.to(device)
    compensated(
        network, narrow, graph, keep, layers, config.compensate, moments, image, calibration.batches
    )
    if config.recalibrate:
        recalibrate(narrow, calibration.batches(config.recalibrate * config.batch_size))
    lineage = card.lineage | {"wide_sha256": digest(network.cpu().state_dict())}
    return narrow.cpu(), replace(card.cut(layers, plan.width), lineage=lineage), error


def cut_before(
    network: nn.Module, card: ModelCard, start: Position, run: Path
) -> tuple[nn.Module, ModelCard]:
    """The cut that an earlier attempt made of ``network``; its weights come with the position.

    Raises DataError when it was another network that was cut.
    """
    plan = start.values["plan"]
    if plan["wide"] != digest(network.cpu().state_dict()):
        raise DataError(
            f"checkpoint {start.name} was cut from another model than {shown(run)} has in rounds/: "
            "restore that model, or remove the checkpoints to repeat the round"
        )
    layers = {name: LayerChannels.from_dict(kept) for name, kept in plan["layers"].items()}
    lineage = card.lineage | {"wide_sha256": plan["wide"]}
    card = replace(card, layers=layers, width=plan["width"], lineage=lineage)
    return card.build(), card
