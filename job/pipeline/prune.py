"""The story of the main job: base -> (slim by γ -> fine-tune -> keep the best) x rounds."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from job.artifacts.accuracy import signed
from job.artifacts.checkpoint import save_position
from job.artifacts.json_records import to_json
from job.artifacts.recommendation import points_lost
from job.artifacts.records import EpochRecord, GammaRecord, RoundRecord, SlimRecord
from job.artifacts.run_folder import likely
from job.console import (
    counted,
    phase,
    progress,
    run_progress,
    say,
    say_cautions,
    show_step,
    tick,
    where,
)
from job.distributed.collectives import accelerator_name, digest, on_main, start
from job.distributed.signals import deferred
from job.distributed.stop import Watch
from job.errors import DataError, StopRequest, exit_code, shown
from job.models.factory import trust_factory
from job.pipeline.base_model import adopted, base_network, base_record, teacher_network
from job.pipeline.cautions import Cautions, of_sample
from job.pipeline.dry_run import dry_run
from job.pipeline.forecast import Forecast
from job.pipeline.session import Attempt
from job.pipeline.setup import planned_rounds, training_tools
from job.pipeline.slim_round import can_cut, cut, cut_before, ranking_norms
from job.pipeline.training_data import dataset_record, prepare_data
from job.processes import is_main
from job.report.tables import epoch_line, rounds_table
from job.slimming.planning.cost import Cost, layer_costs, network_cost
from job.tracking.tracker import gammas
from job.training.distillation import distillation
from job.training.position import CutRecord, Position, PrunedScores, RoundProgress
from job.training.session import RoundSpec, TrainingSession
from job.training.sparsity import describe_sparsity
from job.training.trial import least_batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from accelerate import Accelerator
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.artifacts.records import BaseRecord, SummaryRecord
    from job.artifacts.run_directory import Run
    from job.config import PruneConfig
    from job.data.dataset import Dataset
    from job.data.preprocessing import Preprocessing
    from job.training.distillation import Distillation
    from job.training.epoch import EpochResult
    from job.training.evaluation import Evaluation
    from job.training.gamma import GammaHistogram


T = TypeVar("T")


def prune(config: PruneConfig) -> None:
    """Run the main job, or with ``--dry-run`` check all that it needs. Raises GammaslimError."""
    watch = Watch(likely(config) / "STOP", config.checkpoint_every)
    accelerator = start(config.device, config.precision)
    with deferred():
        if ":" in config.model:  # a model folder may name it too, then
            trust_factory(config.model)
        config = on_main(lambda: adopted(config), interrupt=True)
        watch.follow(likely(config) / "STOP")
        if config.dry_run:
            return dry_run(config, watch, accelerator)
        data, preprocessing = prepare_data(config, watch.check_here, watch.stop_file.parent)
        torch.manual_seed(config.seed)
        network, card = on_main(lambda: base_network(config, data, preprocessing), interrupt=True)
        on_main(lambda: planned_rounds(config, network, card), interrupt=True)  # is it feasible?
        teacher = on_main(lambda: teacher_network(config, card), interrupt=True)
        origin = base_record(config, card, teacher)
        count = len(data.splits["training"])
        least = on_main(lambda: least_batch(network, config, preprocessing.size, count))
        if config.caution:
            say(f"caution: {config.caution}")
        watch.check()
        attempt = Attempt(config, watch)
        job = Job(config, accelerator, data, preprocessing, attempt)
        try:
            job.begin(origin, least)
            with run_progress(job.forecast.text):
                job.learn_from(teacher)
                network, card = job.base(network, card)
                job.learn_from(teacher or network)
                while job.wants_round(network, card):
                    network, card = job.round(network, card)
            job.finish()
        except (KeyboardInterrupt, StopRequest):
            attempt.abandon("stopped", StopRequest.exit_code)
            stop = StopRequest(job.where_stopped())
            stop.reported = not is_main()
            raise stop from None
        except BaseException as error:
            attempt.abandon("failed", exit_code(error))
            raise
        finally:
            attempt.end()
    return None


class Job:
    """What stays the same from round to round."""

    def __init__(
        self,
        config: PruneConfig,
        accelerator: Accelerator,
        data: Dataset,
        preprocessing: Preprocessing,
        attempt: Attempt,
    ) -> None:
        self.config, self.accelerator, self.data = config, accelerator, data
        self.preprocessing, self.attempt = preprocessing, attempt
        self.watch = attempt.watch
        self.start: Position | None = None  # where an earlier attempt stood within a round
        self.entries: list[RoundRecord] = []  # of the base and of each round
        self.distillation: Distillation | None = None
        base_epochs = config.first_epochs + config.sparsity_epochs
        self.forecast = Forecast(base_epochs, config.epochs, config.last_round)

    @property
    def run(self) -> Run:
        """The run directory."""
        return self.attempt.run

    def begin(self, base: BaseRecord, least: int) -> None:
        """Open or create the run directory, the loaders and the W&B run."""
        record = on_main(lambda: dataset_record(self.data))
        self.start = self.attempt.begin(record, base)
        if (epochs := on_main(lambda: self.run.base_epochs)) is not None:
            self.config = replace(self.config, base_epochs=epochs)
            self.forecast.base_epochs = epochs + self.config.sparsity_epochs
        models = counted(self.attempt.saved, "model")
        again = f"; {models} of an earlier attempt" if self.attempt.saved else ""
        if on_main(self.run.finished_summary):
            again = "; the run is finished and only shown"
        if self.attempt.numbered:
            again += f"; {self.attempt.numbered}"
        say(f"run: {shown(self.run.path)} on {accelerator_name(self.accelerator)}{again}")
        self.evaluator, self.trainer, self.calibration = training_tools(
            self.config, self.data, self.preprocessing, self.accelerator, least, self.watch
        )
        self.calibration.progress = tick

    def learn_from(self, teacher: nn.Module | None) -> None:
        """Distil from ``teacher`` from now on, where --distill-alpha asks for it."""
        if teacher and self.config.distill_alpha and not self.distillation:
            weights = self.config.distill_alpha, self.config.distill_temperature
            self.distillation = distillation(teacher, *weights, self.accelerator)

    def base(self, network: nn.Module, card: ModelCard) -> tuple[nn.Module, ModelCard]:
        """Round 0: train the base network, or take it as its weights are."""
        self.cautions = Cautions.of(self.config, self.data, card)
        if self.attempt.saved:
            return self.restore()
        began = self.began()
        sparse = self.config.sparsity_epochs
        if sparse:
            say(describe_sparsity(self.config, sparse, sparse * len(self.trainer.sampler)))
        if self.config.first_epochs + sparse:
            if self.cautions.weights and not (self.start or "fresh_classifier" in card.lineage):
                say_cautions([of_sample(self.evaluator, network)])
            best = self.fit(network, card, self.config.first_epochs, {}, began, sparse)
            scores = _best_scores(best) | self.doubt(network, best)
        else:
            valid = self.evaluate(network)
            if not math.isfinite(valid.loss):
                raise DataError(f"the loss of --weights is {valid.loss}: they are damaged")
            scores = {"valid_acc": valid.accuracy, "valid_loss": valid.loss}
            say(f"base: valid loss: {valid.loss:6.4f}, acc {valid.accuracy:6.4f}")
            scores |= _cautioned(self.cautions.of_base(valid))
        return self.keep(network, card, scores, began, wide=network)

    def round(self, network: nn.Module, card: ModelCard) -> tuple[nn.Module, ModelCard]:
        """Slim by γ, fine-tune, keep the best."""
        if len(self.entries) < self.attempt.saved:
            return self.restore()
        began = self.began()
        self.watch.check()
        if self.start:
            narrow, card = cut_before(network, card, self.start, self.run.path)
            scores = to_json(self.start.progress.scores)
        else:
            shared = (self.config, self.accelerator.device, self.calibration)
            show = partial(show_step, self.forecast.name())
            narrow, card, error = cut(network, card, len(self.entries), *shared, show)
            pruned = self.evaluate(narrow)
            scores = {"valid_acc_pruned": pruned.accuracy}
            self.attempt.log(
                SlimRecord(len(self.entries), card.width, pruned.accuracy, pruned.loss, error)
            )
        best = self.fit(narrow, card, self.config.epochs, scores, began)
        scores = scores | _best_scores(best) | self.doubt(narrow, best)
        return self.keep(narrow, card, scores, began, wide=network)

    def evaluate(self, network: nn.Module) -> Evaluation:
        """``network`` on the validation split."""
        bar, count = progress(self.forecast.name(), "validating"), len(self.evaluator.batches)
        return self.evaluator(network, lambda batches: bar(batches, count), self.watch)

    def doubt(self, network: nn.Module, best: EpochResult) -> dict[str, Any]:
        """Caution where a trained network is no better than chance; for its entry."""
        evaluate = partial(self.evaluate, network)
        return _cautioned(self.cautions.of_round(len(self.entries), best.valid_acc, evaluate))

    def began(self) -> float:
        """When the round that begins now began, as if no attempt had been interrupted."""
        epoch, batch = (self.start.epoch, self.start.batch) if self.start else (0, 0)
        self.move(epoch, batch)
        self.forecast.begin(len(self.entries))
        if self.attempt.saved or self.start:
            self.attempt.tell_resume()
        self.attempt.status("running", None)
        return time.perf_counter() - (self.start.progress.round_seconds if self.start else 0)

    @property
    def first_step(self) -> int:
        """Optimizer steps before the round that is in progress."""
        return self.entries[-1].step if self.entries else 0

    def move(self, epoch: int, batch: int) -> None:
        """Note where the round in progress is: at ``batch`` of ``epoch``."""
        step = self.first_step + epoch * len(self.trainer.sampler) + batch
        self.attempt.at = (len(self.entries), epoch, step)

    def fit(
        self,
        network: nn.Module,
        card: ModelCard,
        epochs: int,
        scores: dict[str, Any],
        began: float,
        sparse_epochs: int = 0,
    ) -> EpochResult:
        """Train ``network`` for ``epochs``; it keeps the best epoch's weights.

        After ``sparse_epochs`` more with a pull on γ it keeps the last one's.
        """
        round_, last = len(self.entries), epochs + sparse_epochs - 1
        ranking = on_main(lambda: ranking_norms(network, self.preprocessing.size, sparse_epochs))
        cost = network_cost(network, self.preprocessing.size)
        start, self.start = self.start, None
        if start and start.epoch > last:  # nothing is left to be trained that would say where it is
            self.attempt.at = (round_, last, self.attempt.at[2])
        layers = None if ranking is None else tuple(ranking)
        spec = RoundSpec(
            round_, epochs, sparse_epochs, self.first_step, layers,
            self.distillation, start,
        )  # fmt: skip
        return self.trainer.fit(network, spec, RoundSession(self, card, cost, scores, began, last))

    def keep(
        self,
        network: nn.Module,
        card: ModelCard,
        scores: dict[str, Any],
        began: float,
        wide: nn.Module,
    ) -> tuple[nn.Module, ModelCard]:
        """Save a round's best model with its numbers, and write the summary so far."""
        cost: Cost = network_cost(network, self.preprocessing.size)
        round_ = len(self.entries)
        entry = RoundRecord(
            round=round_, width=card.width, **asdict(cost), **scores, step=self.attempt.at[2],
            seconds=round(time.perf_counter() - began, 3),
        )  # fmt: skip
        lineage = {"run": shown(self.run.path.absolute()), "round": round_}
        card = replace(card, metrics=to_json(entry), lineage={**card.lineage, **lineage})
        if round_ == 0:
            base_sha256 = digest({k: v.cpu() for k, v in network.state_dict().items()})
            card = replace(card, lineage={"base_sha256": base_sha256, **card.lineage})
        self.attempt.write(lambda: self.run.save_round(round_, network, card))
        self.entries.append(entry)
        self.attempt.log(entry)
        self.summarise("running")
        if self.attempt.tracker:
            layers = layer_costs(network, self.preprocessing.size)
            self.attempt.tracker.log_round(
                to_json(entry), gammas(wide), gammas(network), layers, self.run.round_path(round_)
            )
        if round_ != self.config.last_round:  # else when the run is finished
            self.attempt.report()
        return network, card

    def restore(self) -> tuple[nn.Module, ModelCard]:
        """The best model of a round that an earlier attempt completed."""
        network, card, entry = on_main(lambda: self.run.load_round(len(self.entries)))
        self.entries.append(entry)

        def complete_metrics() -> None:
            unwritten = not self.run.has_line(RoundRecord.EVENT, entry.round)
            if self.attempt.lock.held and unwritten:  # killed between the two
                self.run.log(entry)

        on_main(complete_metrics)
        return network, card

    def wants_round(self, network: nn.Module, card: ModelCard) -> bool:
        """Whether there is a further round, and says why not where --rounds does not."""
        done, last = len(self.entries) - 1, self.config.last_round
        if done < self.attempt.saved - 1:
            return True  # of an earlier attempt
        if (last is not None and done >= last) or self.fallen():
            return False
        narrower = (
            last is not None
            or not done
            or on_main(lambda: can_cut(self.config, network, card, done + 1), interrupt=True)
        )
        if not narrower:
            rate = f"--rate {self.config.rate:g}"
            say(f"nothing more can be cut at {rate} after round {done}: no further rounds")
            return False
        return True

    def fallen(self) -> bool:
        """Whether the last round lost more than it may, and says so."""
        limit, lost = self.config.most_points_lost, points_lost(self.entries, self.entries[-1])
        if limit is None or lost <= limit:
            return False
        option = "--max-drop" if self.config.max_drop is not None else "--rounds auto allows,"
        say(
            f"round {len(self.entries) - 1}: accuracy {signed(-lost)} points against the base, a "
            f"larger drop than {option} {limit:g}: no further rounds"
        )
        return True

    def summarise(self, state: str) -> SummaryRecord:
        """Write the summary of what there is so far."""
        limit, cautions = self.config.max_drop, self.cautions.of_run(self.entries)
        return self.attempt.write(lambda: self.run.summarise(self.entries, state, limit, cautions))

    def finish(self) -> None:
        """Write the final summary and show the table of rounds."""
        summary = on_main(self.run.finished_summary)
        if not summary:
            summary = self.summarise("finished")
        if on_main(lambda: self.run.state) != "finished":  # a full disk may have kept it out
            if self.attempt.at[0] == len(self.entries):  # nothing was left to be trained
                last = self.config.epochs if len(self.entries) > 1 else self.config.first_epochs
                self.attempt.at = (len(self.entries) - 1, max(last, 1) - 1, self.first_step)
            self.attempt.status("finished", 0)
        self.attempt.report()
        say("")
        say(rounds_table(self.entries))
        say(f"\nrecommended: {summary.recommended} ({summary.reason})")
        say_cautions(summary.cautions)
        say(f"{summary.seconds:.0f} seconds; all files are in {shown(self.run.path)}")
        if self.attempt.tracker:
            chosen = self.entries[summary.recommended_round]
            self.attempt.tracker.finish({"recommended": summary.recommended, **to_json(chosen)})

    def where_stopped(self) -> str:
        """The position, and what a later attempt resumes from."""
        rounds = max(len(self.entries), self.attempt.saved) - 1
        saved = f"the base and {rounds} round{'s' * (rounds != 1)} are saved"
        saved = saved if rounds >= 0 else "the base is not finished"
        return (
            f"stopped by request in {where(*self.attempt.at)}; {saved}: "
            "run the same command to resume"
        )


class RoundSession(TrainingSession):
    """What the trainer reports to during a round."""

    def __init__(
        self,
        job: Job,
        card: ModelCard,
        cost: Cost,
        scores: dict[str, Any],
        began: float,
        last: int,
    ) -> None:
        self.job, self.card, self.cost = job, card, cost
        self.scores, self.began, self.last = scores, began, last

    @property
    def watch(self) -> Watch:
        """The run's."""
        return self.job.watch

    def training(self, batches: Iterable[T], epoch: int, batch: int) -> Iterator[T]:
        """Note where the run is."""
        job, steps = self.job, self.job.trainer.steps
        for done, item in enumerate(batches, start=batch):
            job.forecast.train(epoch, done / steps)
            phase(job.forecast.name(), f"epoch {epoch}", done / steps)
            job.move(epoch, done)
            yield item

    def validating(self, batches: Iterable[T], count: int) -> Iterable[T]:
        """Show the progress."""
        return progress(self.job.forecast.name(), "validating")(batches, count)

    def epoch_finished(self, result: EpochResult) -> None:
        """Print and log an epoch."""
        self.job.forecast.trained()
        say(epoch_line(self.card.width, result))
        cost = self.cost
        self.job.attempt.log(
            EpochRecord(
                **result.to_dict(), width=self.card.width, params=cost.params, macs=cost.macs
            )
        )

    def gamma_measured(self, when: str, epoch: int, histogram: GammaHistogram) -> None:
        """Log the γ."""
        self.job.attempt.log(GammaRecord(len(self.job.entries), epoch, when, **asdict(histogram)))

    def save(self, position: Position) -> None:
        """Save the position."""
        job, attempt = self.job, self.job.attempt
        job.move(position.epoch, position.batch)
        if position.epoch > self.last:  # the round is trained: its last epoch is where it is
            attempt.at = (len(job.entries), self.last, attempt.at[2])
        plan = CutRecord(
            self.card.lineage.get("wide_sha256", ""), self.card.width, dict(self.card.layers)
        )

        def write() -> None:
            progress = RoundProgress(
                step=attempt.at[2],
                scores=PrunedScores(**self.scores),
                plan=plan,
                metrics_size=job.run.metrics_size,
                round_seconds=time.perf_counter() - self.began,
                run_seconds=job.run.seconds,
            )
            save_position(job.run.path / "checkpoints", replace(position, run=progress))
            job.run.status("running", None, *attempt.at)

        attempt.write(write)
        self.watch.saved()


def _cautioned(cautions: list[str]) -> dict[str, Any]:
    """Print ``cautions``; what an entry keeps of them."""
    say_cautions(cautions)
    return {"cautions": tuple(cautions)} if cautions else {}


def _best_scores(best: EpochResult) -> dict[str, Any]:
    scores = {"valid_acc": best.valid_acc, "valid_loss": best.valid_loss}
    return {**scores, "best_epoch": best.epoch, "train_acc": best.train_acc}
