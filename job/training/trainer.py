"""One round of training: epochs over the global batches, the best epoch's weights kept.

A round can be left after any step and taken up again, by as many processes as there are then:
``Round.position`` holds all that its future depends on, since the data stream needs no state.
"""

from __future__ import annotations

import copy
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from job.data.batches import TrainingImages
from job.data.loader import build_loader, iterate_batches
from job.data.samplers import GlobalBatches
from job.distributed.collectives import check_same, digest, total
from job.distributed.signals import NOTHING, STOP
from job.errors import GammaslimError, StopRequest
from job.models.outputs import AUXILIARY_WEIGHT, Logits
from job.models.weights import load_tensors
from job.processes import is_main, rank, world_size
from job.training.epoch import EpochResult
from job.training.optimizer import (
    learning_rate,
    new_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from job.training.position import Position
from job.training.sparsity import gamma_histogram, gamma_layers, gamma_numbers, gammas_of, pull
from job.training.sync_batchnorm import (
    average_running_statistics,
    synchronised,
)
from job.training.trial import has_unused_parameters, say_of_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from accelerate import Accelerator

    from job.config import PruneConfig
    from job.data.preprocessing import Preprocessing
    from job.data.splits import Split
    from job.distributed.signals import Watch
    from job.training.distillation import Distillation
    from job.training.evaluation import Evaluator

    Progress = Callable[[Iterable[Any], int], Iterable[Any]]
    Save = Callable[[Position], None]
    OnGamma = Callable[[str, int, dict[str, Any]], None]  # before or after, epoch, histogram

FIRST = torch.contiguous_format  # channels


class Trainer:
    """Trains one network after another on the same split; keeps its loader between rounds."""

    def __init__(
        self,
        split: Split,
        evaluator: Evaluator,
        config: PruneConfig,
        preprocessing: Preprocessing,
        accelerator: Accelerator,
        workers: int,
        least: int = 1,
    ) -> None:
        self.preprocessing, self.evaluator = preprocessing, evaluator
        self.accelerator, self.config = accelerator, config
        self.sampler = GlobalBatches(
            len(split), config.batch_size, config.seed, rank(), world_size(), least
        )
        self.batches = build_loader(
            TrainingImages(split, preprocessing),
            self.sampler,
            workers=workers,
            pin=accelerator.device.type == "cuda",
        )

    def try_step(self, network: nn.Module, distillation: Distillation | None = None) -> None:
        """One step on the first global batch with a copy of ``network``, which stays as it is."""
        training = _Round(self, network, 0, 1, 0, None, lambda _: None)
        training.distillation = distillation
        self.sampler.set_epoch(0, 0)
        training.prepared.train()
        images, labels = next(iter(iterate_batches(self.batches)))
        training.step(images, labels, self.sampler.sizes()[0], 0)
        self.accelerator.free_memory()

    def fit(
        self,
        network: nn.Module,
        round_: int,
        epochs: int,
        first_step: int,
        on_epoch: Callable[[EpochResult], None],
        progress: Progress = lambda batches, _: batches,
        validating: Progress = lambda batches, _: batches,
        *,
        watch: Watch | None = None,
        save: Save = lambda _: None,
        start: Position | None = None,
        sparse_epochs: int = 0,
        gamma_names: Sequence[str] | None = None,
        on_gamma: OnGamma = lambda *_: None,
        distillation: Distillation | None = None,
    ) -> EpochResult:
        """Train ``network`` and leave it with the weights of its best epoch, which is returned.

        Best is the highest accuracy on the validation split, the first of equals. ``first_step``
        is how many optimizer steps the run has taken before. With ``start`` the round goes on from
        there. ``save`` gets the position when ``watch`` says so and after every epoch. Raises
        StopRequest, the position saved, when ``watch`` says so.

        The last ``sparse_epochs`` have a learning-rate schedule of their own and pull on the γ of
        ``gamma_names``, or of all BatchNorms; the last of them counts as the best, since only then
        is γ what was asked for. ``on_gamma`` gets histograms from before and after them. With
        ``distillation`` the network learns from a teacher too.
        """
        training = _Round(self, network, round_, epochs, first_step, watch, save)
        training.dense_epochs, training.distillation = epochs - sparse_epochs, distillation
        names = gamma_layers(network) if gamma_names is None else gamma_names
        training.gammas = gammas_of(training.trained, names)
        if start:
            training.restore(start)
        while training.epoch < epochs:
            if (training.epoch, training.batch) == (training.dense_epochs, 0):
                on_gamma("before", training.epoch, gamma_histogram(training.gammas))
            on_epoch(training.run_epoch(progress, validating))
            training.save_now()
        if sparse_epochs:
            on_gamma("after", epochs, gamma_histogram(training.gammas))
        best = training.best
        assert best is not None
        check_same(digest(training.trained.state_dict()), "the trained network")
        self.accelerator.free_memory()
        return best


class _Round:
    """A round under way: its network and optimizer, and where it stands."""

    def __init__(
        self,
        trainer: Trainer,
        network: nn.Module,
        round_: int,
        epochs: int,
        first_step: int,
        watch: Watch | None,
        save: Save,
    ) -> None:
        self.trainer, self.config, self.accelerator = trainer, trainer.config, trainer.accelerator
        self.kept, self.round, self.epochs, self.first_step = network, round_, epochs, first_step
        self.watch, self.save = watch, save
        self.epoch = self.batch = 0  # the next batch to train on
        self.dense_epochs = epochs  # those before the sparse ones
        self.gammas: list[torch.Tensor] = []
        self.distillation: Distillation | None = None
        self.best: EpochResult | None = None
        device = self.accelerator.device
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, right answers
        self.seconds = 0.0  # that earlier attempts spent on this epoch
        trained = copy.deepcopy(network).to(device)
        self.trained = trained
        shared = world_size() > 1 and self.config.batchnorm == "sync"
        # torch's BatchNorm of a CPU is exact with channels first only: see sync_batchnorm
        self.layout = torch.channels_last if shared or device.type == "cuda" else FIRST
        trained.to(memory_format=self.layout)
        if handler := self.accelerator.ddp_handler:
            handler.find_unused_parameters = has_unused_parameters(
                trained, trainer.preprocessing.size
            )
        if shared:
            synchronised(trained, device)
        self.told = False
        fused = self.accelerator.mixed_precision != "fp16"  # the gradient scaler steps by itself
        self.prepared, self.optimizer = self.accelerator.prepare(
            Logits(trained), new_optimizer(trained, self.config, fused=fused)
        )

    @property
    def sparse(self) -> bool:
        """Whether this epoch pulls on γ."""
        return self.epoch >= self.dense_epochs

    def position(self) -> Position:
        """All that the rest of the round depends on; sums are those of all processes."""
        tensors = {f"model.{k}": v for k, v in self.trained.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors |= {"sums": total(self.sums.clone()), "rng": torch.get_rng_state()}
        if self.best:
            tensors |= {f"best.{k}": v for k, v in self.kept.state_dict().items()}
        scaler = self.accelerator.scaler
        values = {
            "best": self.best.to_dict() if self.best else None,
            "seconds": self.seconds,
            "scaler": scaler.state_dict() if scaler else None,
            "processes": world_size(),
        }
        return Position(self.round, self.epoch, self.batch, values, tensors)

    def restore(self, position: Position) -> None:
        """Go on from ``position``."""

        def part(name: str) -> dict[str, torch.Tensor]:
            prefix = f"{name}."
            found = position.tensors.items()
            return {k.removeprefix(prefix): v for k, v in found if k.startswith(prefix)}

        self.epoch, self.batch = position.epoch, position.batch
        load_tensors(self.trained, part("model"))
        restore_optimizer(self.optimizer, part("optimizer"))
        if is_main():  # the sums of all processes, counted once
            self.sums.copy_(position.tensors["sums"])
        torch.set_rng_state(position.tensors["rng"])
        self.seconds = position.values["seconds"]
        if position.values["best"]:
            self.best = EpochResult(**position.values["best"])
            load_tensors(self.kept, part("best"))
        if self.accelerator.scaler and position.values["scaler"]:
            self.accelerator.scaler.load_state_dict(position.values["scaler"])

    def save_now(self) -> None:
        """Hand the position over to be saved."""
        self.save(self.position())
        if self.watch:
            self.watch.saved()

    def run_epoch(self, progress: Progress, validating: Progress) -> EpochResult:
        """The rest of an epoch, and its evaluation; the best weights so far are kept."""
        began, earlier = time.perf_counter(), self.seconds
        lr = self.train(progress, lambda: earlier + time.perf_counter() - began)
        took = self.seconds
        average_running_statistics(self.trained)
        evaluator = self.trainer.evaluator
        try:
            valid = evaluator(
                self.trained, lambda some: validating(some, len(evaluator.batches)), self.watch
            )
        except StopRequest:
            self.save_now()
            raise
        loss, accuracy = (total(self.sums.clone()) / self.trainer.sampler.count).tolist()
        spent = earlier + time.perf_counter() - began
        step = self.first_step + (self.epoch + 1) * len(self.trainer.sampler)
        speed = self.trainer.sampler.count / took
        result = EpochResult(
            self.round,
            self.epoch,
            step,
            loss,
            accuracy,
            valid.loss,
            valid.accuracy,
            lr,
            speed,
            spent,
            **gamma_numbers(self.gammas),
        )
        if not math.isfinite(loss + valid.loss):
            raise GammaslimError(
                f"round {self.round}, epoch {self.epoch}: the training loss became {loss}, that of "
                f"validation {valid.loss}: try a lower --lr, or --precision fp32"
            )
        if self.best is None or self.sparse or result.valid_acc > self.best.valid_acc:
            self.best = result
            self.kept.load_state_dict(self.trained.state_dict())
        self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        return result

    def train(self, progress: Progress, clock: Callable[[], float]) -> float:
        """Train on the rest of the epoch's batches; returns the last learning rate."""
        sampler = self.trainer.sampler
        sizes = sampler.sizes()
        sampler.set_epoch(self.round, self.epoch, self.batch)
        self.prepared.train()
        lr = self.learning_rate((self.epoch + 1) * len(sizes) - 1)
        rest = sizes[self.batch :]
        batches = progress(iterate_batches(self.trainer.batches), len(rest)) if rest else ()
        for (images, labels), size in zip(batches, rest, strict=True):
            self.step(images, labels, size, self.epoch * len(sizes) + self.batch)
            self.batch += 1
            answer = self.watch.poll() if self.watch else NOTHING
            if answer != NOTHING:
                self.seconds = clock()
                self.save_now()
            if answer == STOP:
                raise StopRequest("stopped by request")
        if rest:
            self.seconds = clock()
        return lr

    def learning_rate(self, number: int) -> float:
        """Of the round's step ``number``; the sparse epochs begin their schedule anew."""
        steps, dense = len(self.trainer.sampler), self.dense_epochs * len(self.trainer.sampler)
        if number < dense:
            return learning_rate(self.config, number, dense)
        return learning_rate(self.config, number - dense, self.epochs * steps - dense)

    def step(self, images: torch.Tensor, labels: torch.Tensor, size: int, number: int) -> None:
        """One optimizer step on this process's part of a global batch of ``size`` pictures."""
        device = self.accelerator.device
        lr = self.learning_rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs = self.trainer.preprocessing.to_input(images.to(device, non_blocking=True))
        inputs = inputs.contiguous(memory_format=self.layout)
        labels = labels.to(device, non_blocking=True)
        logits, *auxiliary = (output.float() for output in self.prepared(inputs))
        if not self.told:
            self.told = True
            say_of_outputs(self.trained, len(auxiliary))
        if self.distillation:
            loss = self.distillation.loss(logits, inputs, labels)
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum")
        for output in auxiliary:
            loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(output, labels, reduction="sum")
        self.optimizer.zero_grad()
        # DDP takes the mean over ranks; the gradient must be the mean over the global batch
        self.accelerator.backward(loss * (world_size() / size))
        self.optimizer.step()
        if self.sparse and not self.accelerator.optimizer_step_was_skipped:
            pull(self.config.sparsity, self.gammas, lr * self.config.sparsity_strength)
        self.sums[0] += loss.detach()
        self.sums[1] += (logits.argmax(1) == labels).sum()
