"""BatchNorm over the global batch of all processes, and accurate with channels last on a CPU.

With several processes the statistics cover the batches of all ranks (Ioffe & Szegedy 2015,
section 3). torch.nn.SyncBatchNorm supports GPUs only. On CPUs, and for subclasses with their own
``forward``, this module intercepts the calls of ``torch.nn.functional.batch_norm``.

With one process a network keeps torch's BatchNorm: its batch is the global batch. The exception
are many rows with channels last on a CPU: see ``batch_normalisation``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from job.distributed.collectives import total
from job.processes import world_size
from job.training.batch_normalisation import ROWS, normalise_batch
from job.training.early_pooling import pool_before_activations

BatchNorm = nn.modules.batchnorm._BatchNorm


def prepare_batch_norms(
    network: nn.Module, device: torch.device, *, shared: bool, compiled: bool
) -> torch.memory_format:
    """Prepare the BatchNorms of ``network`` for training, in place; return its memory format.

    If ``shared`` is true their statistics are those of the global batch. A network that is
    ``compiled`` for a CPU keeps torch's, which are accurate with channels first.
    """
    if shared:
        synchronised(network, device)
    elif device.type == "cpu":
        if compiled:
            return torch.contiguous_format
        accurate_with_channels_last(network)
    if device.type == "cpu" and not compiled:
        pool_before_activations(network)
    return torch.channels_last


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of ``network`` use the statistics of the global batch, in place.

    Covers BatchNorm1d, 2d and 3d, and subclasses that call torch's function. Does nothing with one
    process. Returns ``network``.
    """
    if world_size() == 1:
        return network
    for module in _batch_norms(network):
        if device.type == "cuda" and type(module).forward is BatchNorm.forward:
            module.__class__ = nn.SyncBatchNorm
            module.process_group = None
        else:
            module.__class__ = _intercepted(type(module), shared=True)
    return network


def accurate_with_channels_last(network: nn.Module) -> None:
    """Make every BatchNorm of ``network`` sum accurately with channels last on a CPU, in place.

    The statistics remain those of this process.
    """
    for module in _batch_norms(network):
        module.__class__ = _intercepted(type(module), shared=False)


def _batch_norms(network: nn.Module) -> list[Any]:
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    return [module for module in norms if not isinstance(module, nn.SyncBatchNorm)]


def average_running_statistics(network: nn.Module) -> None:
    """Average the running statistics of every BatchNorm over the processes, in place."""
    if world_size() == 1:
        return
    for module in network.modules():
        if isinstance(module, BatchNorm):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    total(buffer).div_(world_size())


def _intercepted(kind: Any, shared: bool) -> Any:
    """Return a subclass of ``kind`` that normalises by ``normalise_batch`` in train mode."""

    def forward(self: nn.Module, *args: Any, pool: Any = None, **kwargs: Any) -> Any:
        if not self.training:
            return kind.forward(self, *args, **kwargs)
        with _Interception(shared, pool) as calls:
            output = kind.forward(self, *args, **kwargs)
        if shared:
            self.synchronised = calls.answered
        return output

    if "torch._dynamo" in sys.modules:  # the network may be compiled; this forward pass is not
        forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
    return type(f"Global{kind.__name__}", (kind,), {"forward": forward})


def unsynchronised(network: nn.Module) -> list[str]:
    """Return the names of the BatchNorms that did not call torch's function in the last pass."""
    return [
        name
        for name, module in network.named_modules()
        if getattr(module, "synchronised", True) is False
    ]


class _Interception(TorchFunctionMode):
    """While active, torch.nn.functional.batch_norm is ``_batch_norm``, followed by ``pool``."""

    def __init__(self, shared: bool, pool: nn.MaxPool2d | None) -> None:
        super().__init__()
        self.shared, self.pool, self.answered = shared, pool, False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        self.answered = True
        return _batch_norm(self.shared, self.pool, *args, **(kwargs or {}))


def _batch_norm(
    shared: bool,
    pool: nn.MaxPool2d | None,
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Apply batch_norm to this rank's possibly empty part (B, C, …) of a global batch.

    If ``shared`` is false, the batch is that of this rank. ``pool``, if given, is applied next.
    """
    if not training or not (shared or _inaccurate_in_torch(input)):
        plain = F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        return plain if pool is None else pool.forward(plain)
    if input.is_cuda:  # without ``pool``, which is of networks on a CPU
        group = dist.group.WORLD
        output: torch.Tensor = nn.modules._functions.SyncBatchNorm.apply(
            input, weight, bias, running_mean, running_var, eps, momentum, group, world_size()
        )
        return output
    output, mean, variance, count = normalise_batch(input, weight, bias, eps, shared, pool)
    if count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}"
        )
    with torch.no_grad():
        unbiased = variance * (count / max(count - 1, 1))
        for buffer, value in ((running_mean, mean), (running_var, unbiased)):
            if buffer is not None:
                buffer.lerp_(value.to(buffer.dtype), momentum)
    return output.contiguous() if input.is_contiguous() else output  # as torch's


def _inaccurate_in_torch(input: torch.Tensor) -> bool:
    """Return whether torch adds up many rows of ``input`` (B, C, …): see batch_normalisation."""
    if input.device.type != "cpu" or input.dim() != 4 or input.is_contiguous():
        return False
    many = len(input) * input[0, 0].numel() > 2 * ROWS
    return many and input.is_contiguous(memory_format=torch.channels_last)
