"""Trial passes in train mode that find problems of a network before the first step."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.console import counted, say, warn
from job.distributed.collectives import total
from job.errors import DataError, UsageError
from job.models.input_size import input_shape
from job.models.outputs import AUXILIARY_WEIGHT, all_logits
from job.processes import is_main, world_size
from job.training.sync_batchnorm import BatchNorm, unsynchronised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from job.config import PruneConfig
    from job.models.input_size import InputSize


def has_unused_parameters(
    network: nn.Module,
    size: InputSize,
    outputs_in: Callable[[Any], list[torch.Tensor]] = all_logits,
) -> bool:
    """Return whether a parameter gets no gradient on any process, as DDP must know; collective.

    Runs one pass of a copy of ``network``; ``outputs_in`` returns the outputs that are trained.
    Always False with one process.
    """
    if world_size() == 1:
        return False
    inputs = two_images(network, size)
    with _preserve_rng():
        network = copy.deepcopy(network).train()
        outputs = outputs_in(network(inputs))
        torch.stack([output.float().sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    unused = any(p.requires_grad and p.grad is None for p in network.parameters())
    return bool(total(inputs.new_tensor(float(unused))))


def report_outputs(trained: nn.Module, auxiliary: int) -> None:
    """Report auxiliary classifiers and unsynchronised BatchNorms after the first step."""
    if auxiliary:
        weight = f"their losses count {AUXILIARY_WEIGHT} times"
        say(f"training: auxiliary classifiers: {auxiliary}, {weight}")
    names = unsynchronised(trained)
    if names and is_main():
        shown = ", ".join(names[:3]) + " and others" * (len(names) > 3)
        warn(
            f"BatchNorm {shown} does not call torch.nn.functional.batch_norm: each "
            "process normalises its part of a batch, and weights depend on the number of processes"
        )


def least_batch(network: nn.Module, config: PruneConfig, size: InputSize, count: int) -> int:
    """Return the minimum size of a global batch; a smaller last batch joins the previous one.

    A BatchNorm with one value per channel of an image cannot train on one image. Raises UsageError
    when all batches would be too small, DataError when ``count`` images are too few.
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
            f"too few training images, {count}: BatchNorm {name!r} needs {least} in a batch"
        )
    say(
        f"training: the batch before the last also takes {counted(count % batch, 'image')} of the "
        f"last: BatchNorm {name!r} gets one value per channel of each image"
    )
    return least


def batch_for_processes(config: PruneConfig, count: int) -> int:
    """Return the minimum size of a global batch that has an image for every process.

    Raises UsageError if all batches would be too small, and DataError if ``count`` is too small.
    """
    least = world_size()
    if config.batch_size < least:
        raise UsageError(
            f"--batch-size {config.batch_size} is too small for {least} processes: a detector "
            f"needs an image in each, so at least {least}"
        )
    if count < least:
        raise DataError(f"too few training images, {count}: {least} processes need one each")
    return least


def one_value_per_channel(network: nn.Module, size: InputSize) -> str | None:
    """Return the name of the first BatchNorm with one value per channel of an image, or None."""
    names: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            uses_batch = module.training or module.running_mean is None
            if uses_batch and inputs and inputs[0].shape[2:].numel() == 1:
                names.append(name)

        return look

    inputs = two_images(network, size)
    with _preserve_rng(), torch.no_grad():
        network = copy.deepcopy(network).train()
        for name, module in network.named_modules():
            if isinstance(module, BatchNorm):
                module.register_forward_pre_hook(hook(name))
        network(inputs)
    return names[0] if names else None


def two_images(network: nn.Module, size: InputSize) -> torch.Tensor:
    """Return two constant inputs of ``size``, on which every BatchNorm can train."""
    return next(network.parameters()).new_full((2, *input_shape(size)), 0.5)


@contextmanager
def _preserve_rng() -> Iterator[None]:
    """Restore the state of the random number generators at the end."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield
