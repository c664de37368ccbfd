"""The rounds of a run: the base, then slimming rounds that cut and fine-tune."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from job.artifacts.accuracy import score_name, signed_points
from job.artifacts.evaluation_record import find_evaluation
from job.artifacts.json_records import to_json
from job.artifacts.recommendation import points_lost
from job.artifacts.records import LatencyRecord, RoundRecord, SlimRecord
from job.artifacts.stored_places import place_of
from job.console import say, say_cautions, show_step
from job.distributed.collectives import digest, on_main
from job.distributed.memory import return_freed_memory
from job.errors import DataError, shown
from job.pipeline.cautions import sample_caution
from job.pipeline.model import Model
from job.pipeline.round_evaluation import evaluate_round
from job.pipeline.round_latency import measure_round
from job.pipeline.session_state import TrainedModel
from job.pipeline.slim_round import (
    can_cut,
    cut,
    ranking_norms,
    rebuild_cut,
    recover_cut,
)
from job.slimming.latency.machine import device_name
from job.slimming.planning.cost import network_cost
from job.slimming.planning.overview import removed_lines
from job.tracking.wandb_events import round_event
from job.training.checkpoint_content import PrunedScores
from job.training.distillation import distillation
from job.training.epoch import ACCURACY
from job.training.evaluation import Evaluator
from job.training.session import RoundSpec
from job.training.sparsity import describe_sparsity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from torch import nn

    from job.artifacts.evaluation_record import RoundEvaluation
    from job.pipeline.session import Session
    from job.pipeline.setup import Setup
    from job.training.distillation import Distillation
    from job.training.epoch import EpochResult
    from job.training.evaluation import Evaluation
    from job.training.objective import SplitScores


@dataclass(frozen=True)
class BestScores:
    """Scores of a round's best model on the validation split, and cautions about them."""

    valid_acc: float
    valid_loss: float
    best_epoch: int | None = None
    train_acc: float | None = None
    cautions: tuple[str, ...] = ()
    metric: str = ACCURACY
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, best: EpochResult) -> BestScores:
        """Return the scores of a round's best epoch."""
        return cls(
            best.valid_acc,
            best.valid_loss,
            best.epoch,
            best.train_acc,
            metric=best.metric,
            metrics=best.metrics,
        )


def base_round(session: Session) -> Model:
    """Run round 0: train the base network, or evaluate its given weights."""
    if session.claim.saved:
        return restored_round(session)
    setup, config, current = session.setup, session.setup.config, session.start_round()
    model, sparse = Model(setup.network, setup.card), session.setup.config.sparsity_epochs
    if sparse:
        say(describe_sparsity(config, sparse, sparse * setup.trainer.steps))
    if config.first_epochs + sparse:
        new = current.resume or model.card.lineage.fresh_classifier
        if isinstance(setup.evaluator, Evaluator) and session.cautions.weights and not new:
            say_cautions([sample_caution(setup.evaluator, model.network)])
        norms = on_main(lambda: ranking_norms(model, sparse))
        spec = RoundSpec(
            round_index=0,
            epochs=config.first_epochs,
            sparse_epochs=sparse,
            gamma_layers=None if norms is None else tuple(norms),
            distillation=distil_from(setup, setup.teacher),
            resume=current.resume,
        )
        scores = _train(session, model, spec, PrunedScores())
    else:
        scores = _score_weights(session, model.network)
    return keep_round(session, model, scores, wide=model.network)


def slimming_round(session: Session, wide: Model, distillation: Distillation | None) -> Model:
    """Run a slimming round: cut the network, fine-tune it, and keep its best epoch."""
    if len(session.entries) < session.claim.saved:
        return restored_round(session)
    current = session.start_round()
    session.watch.check()
    if current.resume:
        narrow = rebuild_cut(wide, current.resume, session.run.path)
        pruned = current.resume.progress.scores
    else:
        with return_freed_memory():
            narrow, pruned = _slim(session, wide)
    spec = RoundSpec(
        round_index=current.index,
        epochs=session.setup.config.epochs,
        first_step=current.first_step,
        distillation=distillation,
        resume=current.resume,
    )
    scores = _train(session, narrow, spec, pruned)
    return keep_round(session, narrow, scores, wide.network)


def distil_from(setup: Setup, teacher: nn.Module | None) -> Distillation | None:
    """Return the distillation from ``teacher`` for ``--distill-alpha``, or None without it."""
    config = setup.config
    if teacher is None or not config.distill_alpha:
        return None
    weights = config.distill_alpha, config.distill_temperature
    return distillation(teacher, *weights, setup.accelerator)


def _slim(session: Session, wide: Model) -> tuple[Model, PrunedScores]:
    """Cut the network, let it recover, and evaluate it before fine-tuning."""
    setup, index = session.setup, session.round.index
    show = partial(show_step, session.round_name)
    tools = setup.config, setup.accelerator.device, setup.calibration, show
    narrow, plan = cut(wide, index, *tools, base=session.state.base)
    assert plan.proof
    if plan.latency:
        say(str(plan.latency))
    for line in removed_lines(plan.layers):
        say(line)
    pruned = _evaluate(session, narrow.network)
    before = pruned.accuracy, pruned.loss, plan.proof.error
    record = SlimRecord(index, narrow.card.width, *before, metric=pruned.metric)
    if setup.config.recover:
        recover_cut(wide, narrow, plan, *tools)
        scores = _evaluate(session, narrow.network)
        name = f"recovery: valid {pruned.metric}"
        say(f"{name} {pruned.accuracy:6.4f} before, {scores.accuracy:6.4f} after")
        record = replace(
            record, valid_acc_recovered=scores.accuracy, valid_loss_recovered=scores.loss
        )
    session.log(record)
    return narrow, PrunedScores(pruned.accuracy, record.valid_acc_recovered)


def _evaluate(session: Session, network: nn.Module) -> Evaluation | SplitScores:
    """Evaluate ``network`` on the validation split."""
    evaluator = session.setup.evaluator

    def followed(batches: Iterable[Any]) -> Iterable[Any]:
        return session.validating(batches, len(evaluator.batches))

    return evaluator(network, followed, session.watch)


def _train(session: Session, model: Model, spec: RoundSpec, pruned: PrunedScores) -> BestScores:
    """Train the network, which receives the weights of its best epoch; return its scores."""
    network, card = model.network, model.card
    cost = network_cost(network, session.image_size)
    session.start_training(TrainedModel(card, cost, pruned, model.sensitivity))
    best = session.setup.trainer.fit(network, spec, session)
    evaluate = partial(_evaluate, session, network)
    cautions = session.cautions.of_round(spec.round_index, best.valid_acc, evaluate)
    say_cautions(cautions)
    return replace(BestScores.of(best), cautions=tuple(cautions))


def _score_weights(session: Session, network: nn.Module) -> BestScores:
    """Evaluate a base that is not trained; raises DataError when its weights are damaged."""
    valid = _evaluate(session, network)
    if not math.isfinite(valid.loss):
        raise DataError(f"the validation loss of --weights is {valid.loss}: they are damaged")
    say(f"base: valid loss: {valid.loss:6.4f}, {valid.metric} {valid.accuracy:6.4f}")
    cautions = session.cautions.of_base(valid)
    say_cautions(cautions)
    session.keep_predictions(valid.predictions)
    return BestScores(
        valid.accuracy,
        valid.loss,
        cautions=tuple(cautions),
        metric=valid.metric,
        metrics=valid.others,
    )


def keep_round(session: Session, model: Model, scores: BestScores, wide: nn.Module) -> Model:
    """Save a round's best model with its numbers, and write the summary so far."""
    network, card, run, current = model.network, model.card, session.run, session.round
    pruned = current.model.scores if current.model else PrunedScores()
    entry = RoundRecord(
        round=current.index,
        width=card.width,
        **asdict(network_cost(network, session.image_size)),
        **asdict(pruned),
        **asdict(scores),
        step=session.place.step,
        seconds=round(current.seconds, 3),
    )
    entry = _with_latency(session, entry, network)
    lineage = replace(card.lineage, run=shown(place_of(run.path.absolute())), round=current.index)
    if current.index == 0:
        base_sha256 = digest({k: v.cpu() for k, v in network.state_dict().items()})
        lineage = replace(lineage, base_sha256=lineage.base_sha256 or base_sha256)
    card = replace(card, metrics=to_json(entry), lineage=lineage)
    evaluation = on_main(lambda: _evaluation_record(session, network))
    seconds, device = entry.latency, session.setup.accelerator.device
    latency = None if seconds is None else LatencyRecord(seconds, device=device_name(device))
    records = model.sensitivity, evaluation, latency
    session.write(lambda: run.save_round(current.index, network, card, *records))
    session.entries.append(entry)
    session.log(entry)
    session.summarise("running")
    folder = run.round_path(current.index)
    if session.tracker:
        entries = tuple(session.entries)
        session.tracker.log(lambda: round_event(entries, wide, network, card, folder))
    if current.index != session.setup.config.last_round:  # finish() writes the report of the last
        session.report()
    return Model(network, card)


def _with_latency(session: Session, entry: RoundRecord, network: nn.Module) -> RoundRecord:
    """Return ``entry`` with the latency of the round's network, measured on the main process.

    The latency of a slimming round is the recorded latency of the base divided by the speed-up, so
    that it does not depend on a machine that has become slower or faster since the base.
    """
    if entry.round == 0:
        session.state.base = network
    base, device = session.state.base, session.setup.accelerator.device
    base = base if entry.round else None
    latency, gain = on_main(lambda: measure_round(network, base, session.image_size, device))
    first = session.entries[0].latency if session.entries else None
    if gain is None:
        return replace(entry, latency=latency)
    latency = latency if first is None else first / gain.value
    entry = replace(entry, speedup_low=gain.low, speedup_high=gain.high)
    return replace(entry, latency=latency, speedup=gain.value)


def _evaluation_record(session: Session, network: nn.Module) -> RoundEvaluation | None:
    """Return the record of the round's evaluation; None where its predictions are not known."""
    setup, current = session.setup, session.round
    if current.predictions is None or not isinstance(setup.evaluator, Evaluator):
        return None
    base = find_evaluation(session.run.round_path(0)) if current.index else None
    images = setup.evaluator.split, setup.preprocessing, setup.card.num_classes
    return evaluate_round(network, current.predictions, *images, base)


def restored_round(session: Session) -> Model:
    """Load the best model of a round that an earlier job completed."""
    run, index = session.run, len(session.entries)
    network, card, entry = on_main(lambda: run.load_round(index))
    session.entries.append(entry)
    if index == 0:
        session.state.base = network

    def complete_metrics() -> None:
        unwritten = not run.has_line(entry.EVENT, index)
        if session.lock.held and unwritten:  # killed between the model and the line
            run.log(entry)

    on_main(complete_metrics)
    return Model(network, card)


def wants_round(session: Session, model: Model) -> bool:
    """Return whether there is another round; print why not, unless ``--rounds`` are done."""
    config, done = session.setup.config, len(session.entries) - 1
    last = config.last_round
    if done < session.claim.saved - 1:
        return True  # an earlier job completed it
    if (last is not None and done >= last) or _lost_too_much(session):
        return False
    if last is not None or not done:
        return True
    if on_main(lambda: can_cut(config, model, done + 1), interrupt=True):
        return True
    rate = f"--rate {config.rate:g}"
    say(f"nothing more can be cut at {rate} after round {done}: no further rounds")
    return False


def _lost_too_much(session: Session) -> bool:
    """Return whether the last round lost more accuracy than allowed; print it if so."""
    config, entries = session.setup.config, session.entries
    limit, lost = config.most_points_lost, points_lost(entries, entries[-1])
    if limit is None or lost <= limit:
        return False
    option = "--rounds auto" if config.max_drop is None else "--max-drop"
    say(
        f"round {len(entries) - 1}: {score_name(entries[0].metric)} "
        f"{signed_points(-lost)} points compared with the base, "
        f"{option} allows -{limit:g}: no further rounds"
    )
    return True
