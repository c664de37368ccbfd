"""Faster training steps: ``--compile``, and TF32 where the precision is float32 on a GPU."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from job.console import phase, say
from job.errors import UsageError, reason
from job.slimming.latency.runtimes import forget_compiled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

CACHE, SCRATCH = "TORCHINDUCTOR_CACHE_DIR", "SLURM_TMPDIR"


class CompiledNetwork:
    """A network compiled for batches of ``sizes`` images; other batches run uncompiled.

    A round has full batches, which are worth the time of the compiler, and one short last batch.
    The parameters remain those of ``network``. Compiled code is kept in a folder on a local disk,
    so that a run that is resumed finds it.
    """

    def __init__(self, network: nn.Module, sizes: set[int]) -> None:
        if Path(os.environ.get(SCRATCH, "")).is_absolute():  # else torch's own folder for TMPDIR
            os.environ.setdefault(CACHE, str(Path(os.environ[SCRATCH]) / "torchinductor"))
        forget_compiled(len(sizes))  # the network of the last round
        self.network, self.sizes = network, sizes
        self._compiled: Any = torch.compile(network, dynamic=False)
        self._began = False

    def __call__(self, inputs: torch.Tensor) -> Any:
        """Map inputs (B, 3, S, S) to the network's output.

        Raises UsageError when it cannot be compiled here.
        """
        if len(inputs) not in self.sizes:
            return self.network(inputs)
        if self._began:
            return self._compiled(inputs)
        self._began, began = True, time.perf_counter()
        phase("compiling the network")
        try:
            output = self._compiled(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            raise UsageError(
                f"--compile does not work here: {reason(cause)}; install a C++ compiler (on a GPU "
                "also Triton, which torch brings), or leave --compile out"
            ) from error
        say(f"training: the network is compiled, {time.perf_counter() - began:.1f} s")
        return output


@contextmanager
def fast_matmul(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in TF32 on a GPU, as torch does convolutions by default.

    Only in training: the least squares of a cut need all of float32.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before
