"""One pass of a network in train mode, before the first step: what a step would trip over."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.console import say, warn
from job.distributed.collectives import total
from job.errors import DataError, UsageError
from job.models.outputs import AUXILIARY_WEIGHT, all_logits
from job.processes import is_main, world_size
from job.training.sync_batchnorm import BatchNorm, unsynchronised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from job.config import PruneConfig


def has_unused_parameters(network: nn.Module, size: int) -> bool:
    """Whether, on any process, a parameter gets no gradient: DDP must be told; collective.

    Found by one pass of a copy of ``network``; only where there are several processes.
    """
    if world_size() == 1:
        return False
    inputs = _two_images(network, size)
    with _apart():
        network = copy.deepcopy(network).train()
        outputs = all_logits(network(inputs))
        torch.stack([output.float().sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    unused = any(p.requires_grad and p.grad is None for p in network.parameters())
    return bool(total(inputs.new_tensor(float(unused))))


def say_of_outputs(trained: nn.Module, auxiliary: int) -> None:
    """Report what the first step of ``trained`` showed: classifiers, BatchNorms on their own."""
    if auxiliary:
        weight = f"their losses count {AUXILIARY_WEIGHT} times"
        say(f"training: auxiliary classifiers: {auxiliary}, {weight}")
    names = unsynchronised(trained)
    if names and is_main():
        shown = ", ".join(names[:3]) + " and others" * (len(names) > 3)
        warn(
            f"BatchNorm {shown} does not call torch.nn.functional.batch_norm: each "
            "process normalises its own part of a batch, and weights depend on their number"
        )


def least_batch(network: nn.Module, config: PruneConfig, size: int, count: int) -> int:
    """How few of ``count`` images a global batch may have; a last one of fewer joins another.

    A BatchNorm that sees one value per channel of an image cannot train on one image. Raises
    UsageError where all batches would be too small, DataError where there are too few images.
    """
    parts = world_size() if config.batchnorm == "local" else 1
    least, batch = 2 * parts, config.batch_size
    if batch >= least and not 0 < count % batch < least:
        return 1
    name = one_value_per_channel(network, size)
    if name is None:
        return 1
    if batch < least:
        raise UsageError(
            f"--batch-size {batch} is too small: BatchNorm {name!r} gets one value per channel of "
            f"each image, and needs two in every process's part of a batch: at least {least}"
        )
    if count < least:
        raise DataError(
            f"{count} training images are too few: BatchNorm {name!r} needs {least} in a batch"
        )
    say(
        f"training: the last {count % batch} of {count:,} images join the batch before them: "
        f"BatchNorm {name!r} gets one value per channel of each"
    )
    return least


def one_value_per_channel(network: nn.Module, size: int) -> str | None:
    """The first BatchNorm of ``network`` that gets one value per channel of an image, if any."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            measures = module.training or module.running_mean is None
            if measures and inputs and inputs[0].shape[2:].numel() == 1:
                found.append(name)

        return look

    inputs = _two_images(network, size)
    with _apart(), torch.no_grad():
        network = copy.deepcopy(network).train()
        for name, module in network.named_modules():
            if isinstance(module, BatchNorm):
                module.register_forward_pre_hook(hook(name))
        network(inputs)
    return found[0] if found else None


def _two_images(network: nn.Module, size: int) -> torch.Tensor:
    """Inputs that every network trains on, whatever its BatchNorms see of one image."""
    return next(network.parameters()).new_full((2, 3, size, size), 0.5)


@contextmanager
def _apart() -> Iterator[None]:
    """Leave the random numbers as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield
