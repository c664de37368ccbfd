"""Train a network for one round, and keep the weights of the best epoch.

A round can be stopped after any step and resumed by any number of processes:
``TrainingRound.position`` returns the state to resume from. The data stream has no other state: it
is a function of the position.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import torch

from job.data.loader import Loader, iterate_batches
from job.data.samplers import GlobalBatches
from job.data.task_items import training_items
from job.distributed.collectives import check_same, digest, total
from job.distributed.stop import NOTHING, STOP
from job.errors import StopRequest
from job.models.weights import load_tensors
from job.processes import is_main, rank, world_size
from job.slimming.calibration.memory_format import runs_channels_last, set_memory_format
from job.training.checkpoint_content import Position, TrainingProgress
from job.training.compilation import CompiledNetwork, fast_matmul
from job.training.epoch import EpochResult
from job.training.gamma import gamma_histogram, gamma_layers, gamma_parameters, gamma_statistics
from job.training.micro_batches import (
    divide_gradients,
    micro_batches,
    part_sizes,
    split_samples,
)
from job.training.objective import ClassificationObjective
from job.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from job.training.schedule import round_learning_rate
from job.training.session import RoundSpec, RoundState, TrainingSession, Unattended
from job.training.sparsity import apply_penalty
from job.training.sync_batchnorm import average_running_statistics, prepare_batch_norms
from job.training.trial import report_outputs, two_images

if TYPE_CHECKING:
    from collections.abc import Iterable

    from accelerate import Accelerator
    from torch import nn

    from job.config import PruneConfig
    from job.data.preprocessing import Preprocessing
    from job.data.splits import Split
    from job.training.distillation import Distillation
    from job.training.evaluation import Evaluation, Evaluator
    from job.training.objective import Objective, SplitScores
    from job.training.task_evaluation import TaskEvaluator


class Trainer:
    """Trains networks on ``split``; keeps its loader and workers between rounds.

    A global batch has at least ``least`` images.
    """

    def __init__(
        self,
        split: Split,
        evaluator: Evaluator | TaskEvaluator,
        config: PruneConfig,
        preprocessing: Preprocessing,
        accelerator: Accelerator,
        workers: int,
        least: int = 1,
        objective: Objective | None = None,
    ) -> None:
        self.preprocessing, self.evaluator = preprocessing, evaluator
        self.objective = objective or ClassificationObjective(preprocessing)
        self.accelerator, self.config = accelerator, config
        self.sampler = GlobalBatches(
            len(split), config.batch_size, config.seed, rank(), world_size(), least
        )
        cuda = accelerator.device.type == "cuda"
        samples = training_items(split, preprocessing, rotate_later=cuda)
        self.batches = Loader(samples, self.sampler, workers=workers, pin=cuda)

    @property
    def steps(self) -> int:
        """Number of optimizer steps in an epoch."""
        return len(self.sampler)

    def fit(
        self, network: nn.Module, spec: RoundSpec, session: TrainingSession | None = None
    ) -> EpochResult:
        """Train ``network`` according to ``spec``; it receives the weights of its best epoch.

        Returns the best epoch: the first with the highest accuracy on the validation split. With
        sparse epochs it is the last epoch, since only then γ is sparse. The session saves the
        position after every epoch and when its watch requests it. Raises StopRequest, after the
        position is saved, if a stop is requested, and GammaslimError if a loss is not finite.
        """
        session = session or Unattended()
        training = TrainingRound(self, network, spec, session)
        state = training.state
        while state.epoch < spec.all_epochs:
            if (state.epoch, state.batch) == (spec.epochs, 0):
                histogram = gamma_histogram(training.gammas)
                session.gamma_measured("before", state.epoch, histogram)
            session.epoch_finished(training.run_epoch())
            session.save(training.position())
        if spec.sparse_epochs:
            session.gamma_measured("after", spec.all_epochs, gamma_histogram(training.gammas))
        assert state.best is not None
        session.keep_predictions(state.predictions)
        check_same(digest(training.trained.state_dict()), "the trained network")
        self.accelerator.free_memory()
        return state.best

    def try_step(
        self, network: nn.Module, distillation: Distillation | None = None, compiled: bool = True
    ) -> None:
        """Train a copy of ``network`` for one step, on the first global batch."""
        spec = RoundSpec(round_index=0, epochs=1, distillation=distillation, compiled=compiled)
        training = TrainingRound(self, network, spec, Unattended())
        self.sampler.set_epoch(0, 0)
        training.prepared.train()
        batch = next(iterate_batches(self.batches, self.accelerator.device))
        training.step(batch, self.sampler.sizes()[0], 0)
        self.accelerator.free_memory()


class TrainingRound:
    """Trains a copy of ``network``, which receives the weights of the best epoch."""

    def __init__(
        self, trainer: Trainer, network: nn.Module, spec: RoundSpec, session: TrainingSession
    ) -> None:
        self.trainer, self.spec, self.session = trainer, spec, session
        self.config, self.accelerator = trainer.config, trainer.accelerator
        self.network, self.state = network, RoundState()
        device = self.accelerator.device
        self.objective = trainer.objective
        self.sums = torch.zeros(self.objective.length, dtype=torch.float64, device=device)
        self.trained = copy.deepcopy(network).to(device)
        if handler := self.accelerator.ddp_handler:
            parts = self.trained, trainer.preprocessing.input_size
            handler.find_unused_parameters = self.objective.has_unused_parameters(*parts)
        compiled = self.config.compile and spec.compiled
        shared = world_size() > 1 and self.config.batchnorm == "sync"
        images = two_images(self.trained, trainer.preprocessing.input_size)
        last = runs_channels_last(self.trained, images, training=True)
        layout = prepare_batch_norms(self.trained, device, shared=shared, compiled=compiled)
        self.layout = layout if last else torch.contiguous_format
        set_memory_format(self.trained, self.layout)
        # with fp16 the gradient scaler decides on each step
        fused = self.accelerator.mixed_precision != "fp16"
        sizes = part_sizes(trainer.sampler.sizes()[0], self.config.accumulate)
        run = CompiledNetwork(self.trained, sizes) if compiled else None
        self.prepared, self.optimizer = self.accelerator.prepare(
            self.objective.module(self.trained, run),
            build_optimizer(self.trained, self.config, fused=fused),
        )
        names = gamma_layers(network) if spec.gamma_layers is None else spec.gamma_layers
        self.gammas = gamma_parameters(self.trained, names)
        if spec.resume:
            self._restore(spec.resume)

    @property
    def sparse(self) -> bool:
        """Whether this epoch penalises γ."""
        return self.state.epoch >= self.spec.epochs

    def position(self) -> Position:
        """Return the state that the rest of the round depends on; collective."""
        state, scaler = self.state, self.accelerator.scaler
        tensors = {f"model.{k}": v for k, v in self.trained.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors |= {"sums": total(self.sums.clone()), "rng": torch.get_rng_state()}
        if state.best:
            tensors |= {f"best.{k}": v for k, v in self.network.state_dict().items()}
            if state.predictions is not None:
                tensors["predictions"] = state.predictions
        progress = TrainingProgress(
            processes=world_size(),
            seconds=state.seconds,
            best=state.best,
            scaler=scaler.state_dict() if scaler else None,
        )
        return Position(self.spec.round_index, state.epoch, state.batch, progress, tensors)

    def _restore(self, position: Position) -> None:
        """Restore the state that the method ``position`` returned."""
        state, values = self.state, position.training
        state.epoch, state.batch, state.seconds = position.epoch, position.batch, values.seconds
        load_tensors(self.trained, position.part("model"))
        restore_optimizer(self.optimizer, position.part("optimizer"))
        if is_main():  # the sums of all processes, counted once
            self.sums.copy_(position.tensors["sums"])
        torch.set_rng_state(position.tensors["rng"])
        if values.best:
            state.best = values.best
            load_tensors(self.network, position.part("best"))
            state.predictions = position.tensors.get("predictions")  # earlier versions save none
        if self.accelerator.scaler and values.scaler:
            self.accelerator.scaler.load_state_dict(values.scaler)

    def run_epoch(self) -> EpochResult:
        """Train on the rest of the epoch and evaluate it; keep its weights if it is the best."""
        state, earlier, began = self.state, self.state.seconds, time.perf_counter()
        with fast_matmul(self.accelerator.device):
            lr = self._train(began - earlier)
        speed = self.trainer.sampler.count / state.seconds
        average_running_statistics(self.trained)
        valid = self._evaluate()
        trained = self.objective.scores(total(self.sums.clone()), self.trainer.sampler.count)
        result = EpochResult(
            round=self.spec.round_index,
            epoch=state.epoch,
            step=self.spec.first_step + (state.epoch + 1) * self.trainer.steps,
            train_loss=trained.loss,
            train_acc=trained.metrics.get(trained.metric),
            valid_loss=valid.loss,
            valid_acc=valid.accuracy,
            lr=lr,
            images_per_second=speed,
            seconds=earlier + time.perf_counter() - began,
            **gamma_statistics(self.gammas),
            metric=trained.metric,
            metrics=valid.others,
        )
        result.check_finite()
        if state.best is None or self.sparse or result.valid_acc > state.best.valid_acc:
            state.best, state.predictions = result, valid.predictions
            self.network.load_state_dict(self.trained.state_dict())
        state.epoch, state.batch, state.seconds = state.epoch + 1, 0, 0.0
        self.sums.zero_()
        return result

    def _evaluate(self) -> Evaluation | SplitScores:
        """Evaluate the trained network; on a request to stop, save the position and raise."""
        evaluator, session = self.trainer.evaluator, self.session

        def followed(batches: Iterable[Any]) -> Iterable[Any]:
            return session.validating(batches, len(evaluator.batches))

        try:
            return evaluator(self.trained, followed, session.watch)
        except StopRequest:
            session.save(self.position())
            raise

    def _train(self, began: float) -> float:
        """Train on the rest of the epoch's batches; return the last learning rate.

        ``began`` is when the epoch would have begun without interruptions (``time.perf_counter``).
        """
        state, sampler, watch = self.state, self.trainer.sampler, self.session.watch
        sizes = sampler.sizes()
        sampler.set_epoch(self.spec.round_index, state.epoch, state.batch)
        self.prepared.train()
        rest = sizes[state.batch :]
        device = self.accelerator.device
        batches = iterate_batches(self.trainer.batches, device) if rest else ()
        followed = self.session.training(batches, state.epoch, state.batch)
        for batch, size in zip(followed, rest, strict=True):
            self.step(batch, size, state.epoch * len(sizes) + state.batch)
            state.batch += 1
            answer = watch.poll() if watch else NOTHING
            if answer != NOTHING:
                self._finish_steps(began)
                self.session.save(self.position())
            if answer == STOP:
                raise StopRequest("stopped by request")
        if rest:
            self._finish_steps(began)
        return self.learning_rate((state.epoch + 1) * len(sizes) - 1)

    def _finish_steps(self, began: float) -> None:
        """Wait for the device, and record the time that its steps took since ``began``."""
        torch.get_device_module(self.accelerator.device).synchronize()
        self.state.seconds = time.perf_counter() - began

    def learning_rate(self, step: int) -> float:
        """Return the learning rate at ``step`` of the round."""
        return round_learning_rate(self.config, self.spec, self.trainer.steps, step)

    def step(self, batch: Any, size: int, number: int) -> None:
        """Take the round's optimizer step ``number`` on this process's part of a global batch.

        ``batch`` contains inputs and targets on the device. ``size`` is the number of samples in
        the global batch. Does not wait for the device, except with fp16.
        """
        lr = self.learning_rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        chunks = split_samples(batch, micro_batches(size, self.config.accumulate))
        self.optimizer.zero_grad()
        sums = torch.zeros_like(self.sums)
        for chunk in chunks[:-1]:
            with self.accelerator.no_sync(self.prepared):
                sums += self._add_gradient(chunk, size)
        sums += self._add_gradient(chunks[-1], size)
        if (count := self.objective.counted(sums)) is not None:
            divide_gradients(self.trained, total(count.clone()) / size)
        self.optimizer.step()
        if self.sparse and not self.accelerator.optimizer_step_was_skipped:
            apply_penalty(self.config.sparsity, self.gammas, lr * self.config.sparsity_strength)

    def _add_gradient(self, batch: Any, size: int) -> torch.Tensor:
        """Add the gradient of some samples of a global batch of ``size``; return their sums."""
        inputs, targets = self.objective.place(batch)
        if isinstance(inputs, torch.Tensor) and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=self.layout)
        outputs = self.prepared(inputs)
        if not self.state.outputs_reported:
            self.state.outputs_reported = True
            report_outputs(self.trained, self.objective.auxiliary(outputs))
        loss, sums = self.objective.measure(outputs, inputs, targets, self.spec.distillation)
        # DDP takes the mean over ranks; the gradient must be the mean over the global batch
        self.accelerator.backward(loss * (world_size() / size))
        self.sums += sums
        return sums
