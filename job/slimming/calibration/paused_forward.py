"""Forward passes that pause before a layer, so that earlier layers can be changed meanwhile."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from job.slimming.graph.modes import eval_with_hooks
from job.slimming.inputs import call_network, map_tensors, tensors_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from job.slimming.inputs import Example


class _StopPassError(BaseException):
    """Ends a pass early: its remaining layers are not needed."""


class ForwardPass(threading.Thread):
    """A pass of ``network`` over ``example`` that runs from one layer to a later one.

    It is a thread, so that its stack keeps the state of the network's code during a pause. Only one
    of the threads runs at a time.
    """

    def __init__(self, network: nn.Module, example: Example) -> None:
        super().__init__(daemon=True)
        self.network, self.example = network, example
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._target: nn.Module | None = None
        self._input: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._finished = self._cancelled = False

    def run_until(self, layer: nn.Module) -> torch.Tensor | None:
        """Run until the next call of ``layer`` and return its input; None where none is left.

        The input is valid until the pass resumes. Raises what the network raises.
        """
        self._target, self._input = layer, None
        if not self._finished:
            self._resume.release()
            self._paused.acquire()
        if self._error:
            raise self._error
        return self._input

    def run(self) -> None:
        """Run the network's forward pass, in the thread."""
        self._resume.acquire()
        try:
            # the current device and the gradient mode are kept for each thread separately
            device = next(tensors_in(self.example)).device
            cuda = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with cuda, torch.no_grad():
                if not self._cancelled:
                    call_network(self.network, self.example)
        except _StopPassError:
            pass
        except BaseException as error:
            self._error = error
        self._input, self._finished = None, True
        self._paused.release()

    def pause_before(self, layer: nn.Module, values: torch.Tensor) -> None:
        """Pause if ``layer`` is the one to run until; ``values`` is its input."""
        if self._target is layer and not self._cancelled:
            self._input = values
            self._paused.release()
            self._resume.acquire()
        if self._cancelled:
            raise _StopPassError

    def cancel(self) -> None:
        """End the pass without its remaining layers."""
        self._cancelled = True
        self._resume.release()
        self.join()


@contextmanager
def contiguous_weights(network: nn.Module) -> Iterator[None]:
    """Store the weights of convolutions in the default memory format meanwhile.

    cuDNN prepares a channels-last convolution again in every thread, which took 1 to 4 s a pass of
    StudentNet on an H100, and 0.05 s in the default format.
    """
    moved = [
        (p, p.data) for p in network.parameters() if p.dim() == 4 and p.stride() != _strides(p)
    ]
    for parameter, original in moved:
        parameter.data = original.clone(memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        for parameter, original in moved:
            parameter.data = original.copy_(parameter.data)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of the default format; ``is_contiguous`` takes no notice of an axis of size 1."""
    return torch.empty(tensor.shape, device="meta").stride()


@contextmanager
def forward_passes(
    network: nn.Module, layers: Iterable[nn.Module], batches: Sequence[Example]
) -> Iterator[list[ForwardPass]]:
    """Start one pass in eval mode for each of ``batches``; they can pause before ``layers``."""

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        thread = threading.current_thread()
        if isinstance(thread, ForwardPass):
            thread.pause_before(layer, inputs[0])

    hooks = [(layer, hook) for layer in layers]
    # the values of buffers are not put back: a narrow network's statistics may change meanwhile
    layout: AbstractContextManager[None] = nullcontext()
    if any(tensor.is_cuda for batch in batches for tensor in tensors_in(batch)):
        layout = contiguous_weights(network)
        batches = [map_tensors(batch, torch.Tensor.contiguous) for batch in batches]
    passes = [ForwardPass(network, batch) for batch in batches]
    with layout, eval_with_hooks(network, hooks, values=False):
        for forward_pass in passes:
            forward_pass.start()
        try:
            yield passes
        finally:
            for forward_pass in passes:
                forward_pass.cancel()
