"""One round of training: epochs over the global batches, the best epoch's weights kept."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from job.data.batches import GlobalBatches, TrainingPictures, checked, loader
from job.errors import GammaslimError
from job.processes import check_same, digest, rank, total, world
from job.training.optimizer import learning_rate, new_optimizer
from job.training.sync_batchnorm import average_running_statistics, synchronised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from accelerate import Accelerator
    from torch import nn

    from job.config import PruneConfig
    from job.data import Preprocessing, Split
    from job.training.evaluation import Evaluator

    Progress = Callable[[Iterable[Any], int], Iterable[Any]]


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
    ) -> EpochResult:
        """Train ``network`` and leave it with the weights of its best epoch, which is returned.

        Best is the highest accuracy on the validation split, the first of equals. ``first_step``
        is how many optimizer steps the run has taken before.
        """
        trained = copy.deepcopy(network).to(self.accelerator.device)
        trained.to(memory_format=torch.channels_last)
        if self.config.batchnorm == "sync":
            trained = synchronised(trained, self.accelerator.device)
        fused = self.accelerator.mixed_precision != "fp16"  # the gradient scaler steps by itself
        prepared, optimizer = self.accelerator.prepare(
            trained, new_optimizer(trained, self.config, fused=fused)
        )
        best: EpochResult | None = None
        for epoch in range(epochs):
            began = time.perf_counter()
            loss, accuracy, lr = self._epoch(prepared, optimizer, round_, epoch, epochs, progress)
            took = time.perf_counter() - began
            average_running_statistics(trained)
            valid = self.evaluator(trained)
            result = EpochResult(
                round_, epoch, first_step + (epoch + 1) * len(self.sampler), loss, accuracy,
                valid.loss, valid.accuracy, lr, self.sampler.count / took,
                time.perf_counter() - began,
            )  # fmt: skip
            if not math.isfinite(loss + valid.loss):
                raise GammaslimError(
                    f"round {round_}, epoch {epoch}: the training loss became {loss}, that of "
                    f"validation {valid.loss}: try a lower --lr, or --precision fp32"
                )
            if best is None or result.valid_acc > best.valid_acc:
                best = result
                network.load_state_dict(trained.state_dict())
            on_epoch(result)
        assert best is not None
        check_same(digest(trained.state_dict()), "the trained network")
        self.accelerator.free_memory()
        return best

    def _epoch(
        self,
        network: nn.Module,
        optimizer: Any,
        round_: int,
        epoch: int,
        epochs: int,
        progress: Progress,
    ) -> tuple[float, float, float]:
        """Train one epoch: mean loss and accuracy over its pictures, and its last learning rate."""
        device, sizes = self.accelerator.device, self.sampler.sizes()
        self.sampler.set_epoch(round_, epoch)
        network.train()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        lr = self.config.lr
        batches = progress(checked(self.batches), len(sizes))
        for step, ((images, labels), size) in enumerate(zip(batches, sizes, strict=True)):
            lr = learning_rate(self.config, epoch * len(sizes) + step, epochs * len(sizes))
            for group in optimizer.param_groups:
                group["lr"] = lr
            inputs = self.preprocessing.to_input(images.to(device, non_blocking=True))
            labels = labels.to(device, non_blocking=True)
            logits = network(inputs).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            optimizer.zero_grad()
            # DDP takes the mean over ranks; the gradient must be the mean over the global batch
            self.accelerator.backward(loss * (world() / size))
            optimizer.step()
            sums[0] += loss.detach()
            sums[1] += (logits.argmax(1) == labels).sum()
        mean_loss, accuracy = (total(sums) / self.sampler.count).tolist()
        return mean_loss, accuracy, lr
