"""One round of training: epochs over the global batches, the best epoch's weights kept.

A round can be left after any step and taken up again, by as many processes as there are then:
``Round.position`` holds all that its future depends on, since the data stream needs no state.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from job.checkpoint import Position
from job.data.batches import GlobalBatches, TrainingPictures, checked, loader
from job.errors import GammaslimError, StopRequest
from job.processes import check_same, digest, rank, total, world
from job.signals import NOTHING, STOP
from job.training.optimizer import (
    learning_rate,
    new_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from job.training.sync_batchnorm import average_running_statistics, synchronised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from accelerate import Accelerator
    from torch import nn

    from job.config import PruneConfig
    from job.data import Preprocessing, Split
    from job.signals import Watch
    from job.training.evaluation import Evaluator

    Progress = Callable[[Iterable[Any], int], Iterable[Any]]
    Save = Callable[[Position], None]


@dataclass(frozen=True)
class EpochResult:
    """One epoch; losses and accuracies are means over every picture of the split."""

    round: int
    epoch: int
    step: int
    train_loss: float
    train_acc: float
    valid_loss: float
    valid_acc: float
    lr: float
    images_per_second: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Field by field."""
        return asdict(self)


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
    ) -> None:
        self.preprocessing, self.evaluator = preprocessing, evaluator
        self.accelerator, self.config = accelerator, config
        self.sampler = GlobalBatches(len(split), config.batch_size, config.seed, rank(), world())
        self.batches = loader(
            TrainingPictures(split, preprocessing),
            self.sampler,
            workers=workers,
            pin=accelerator.device.type == "cuda",
        )

    def fit(
        self,
        network: nn.Module,
        round_: int,
        epochs: int,
        first_step: int,
        on_epoch: Callable[[EpochResult], None],
        progress: Progress = lambda batches, _: batches,
        *,
        watch: Watch | None = None,
        save: Save = lambda _: None,
        start: Position | None = None,
    ) -> EpochResult:
        """Train ``network`` and leave it with the weights of its best epoch, which is returned.

        Best is the highest accuracy on the validation split, the first of equals. ``first_step``
        is how many optimizer steps the run has taken before. With ``start`` the round goes on from
        there. ``save`` gets the position when ``watch`` says so and after every epoch. Raises
        StopRequest, the position saved, when ``watch`` says so.
        """
        training = _Round(self, network, round_, epochs, first_step, watch, save)
        if start:
            training.restore(start)
        while training.epoch < epochs:
            on_epoch(training.run_epoch(progress))
            training.save_now()
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
        self.best: EpochResult | None = None
        device = self.accelerator.device
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, right answers
        self.seconds = 0.0  # that earlier attempts spent on this epoch
        trained = copy.deepcopy(network).to(device)
        trained.to(memory_format=torch.channels_last)
        if self.config.batchnorm == "sync":
            trained = synchronised(trained, device)
        self.trained = trained
        fused = self.accelerator.mixed_precision != "fp16"  # the gradient scaler steps by itself
        self.prepared, self.optimizer = self.accelerator.prepare(
            trained, new_optimizer(trained, self.config, fused=fused)
        )

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
            "processes": world(),
        }
        return Position(self.round, self.epoch, self.batch, values, tensors)

    def restore(self, position: Position) -> None:
        """Go on from ``position``."""

        def part(name: str) -> dict[str, torch.Tensor]:
            prefix = f"{name}."
            found = position.tensors.items()
            return {k.removeprefix(prefix): v for k, v in found if k.startswith(prefix)}

        self.epoch, self.batch = position.epoch, position.batch
        self.trained.load_state_dict(part("model"))
        restore_optimizer(self.optimizer, part("optimizer"))
        if rank() == 0:  # the sums of all processes, counted once
            self.sums.copy_(position.tensors["sums"])
        torch.set_rng_state(position.tensors["rng"])
        self.seconds = position.values["seconds"]
        if position.values["best"]:
            self.best = EpochResult(**position.values["best"])
            self.kept.load_state_dict(part("best"))
        if self.accelerator.scaler and position.values["scaler"]:
            self.accelerator.scaler.load_state_dict(position.values["scaler"])

    def save_now(self) -> None:
        """Hand the position over to be saved."""
        self.save(self.position())
        if self.watch:
            self.watch.saved()

    def run_epoch(self, progress: Progress) -> EpochResult:
        """The rest of an epoch, and its evaluation; the best weights so far are kept."""
        began, earlier = time.perf_counter(), self.seconds
        lr = self.train(progress, lambda: earlier + time.perf_counter() - began)
        took = self.seconds
        average_running_statistics(self.trained)
        try:
            valid = self.trainer.evaluator(self.trained, watch=self.watch)
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
        )
        if not math.isfinite(loss + valid.loss):
            raise GammaslimError(
                f"round {self.round}, epoch {self.epoch}: the training loss became {loss}, that of "
                f"validation {valid.loss}: try a lower --lr, or --precision fp32"
            )
        if self.best is None or result.valid_acc > self.best.valid_acc:
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
        lr = learning_rate(self.config, (self.epoch + 1) * len(sizes) - 1, self.epochs * len(sizes))
        rest = sizes[self.batch :]
        batches = progress(checked(self.trainer.batches), len(rest)) if rest else ()
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

    def step(self, images: torch.Tensor, labels: torch.Tensor, size: int, number: int) -> None:
        """One optimizer step on this process's part of a global batch of ``size`` pictures."""
        device = self.accelerator.device
        lr = learning_rate(self.config, number, self.epochs * len(self.trainer.sampler))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs = self.trainer.preprocessing.to_input(images.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        logits = self.prepared(inputs).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self.optimizer.zero_grad()
        # DDP takes the mean over ranks; the gradient must be the mean over the global batch
        self.accelerator.backward(loss * (world() / size))
        self.optimizer.step()
        self.sums[0] += loss.detach()
        self.sums[1] += (logits.argmax(1) == labels).sum()
