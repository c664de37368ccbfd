"""Forward passes that stand still in front of a layer until the layers before it are changed."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from job.slimming.graph.trace import eval_with_hooks, trace_network
from job.slimming.inputs import call_network, tensors_of_inputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

    from job.slimming.inputs import Example

READS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})


class _EnoughError(BaseException):
    """Ends a pass: what comes behind need not be computed."""


class ForwardPass(threading.Thread):
    """``network`` on ``example``, a batch as it takes them, from one layer to a later one.

    A thread of its own keeps what the network's code is about to do; one of them runs at a time.
    """

    def __init__(self, network: nn.Module, example: Example) -> None:
        super().__init__(daemon=True)
        self.network, self.example = network, example
        self._turn, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._wanted: nn.Module | None = None
        self._read: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._over = self._unwanted = False

    def until(self, layer: nn.Module) -> torch.Tensor | None:
        """Go on to ``layer``: what it is about to read, to be used at once; None at the end.

        Raises what the network raises.
        """
        self._wanted, self._read = layer, None
        if not self._over:
            self._turn.release()
            self._there.acquire()
        if self._error:
            raise self._error
        return self._read

    def run(self) -> None:
        """The network's own forward pass."""
        self._turn.acquire()
        try:
            # which device is the current one, and whether there are gradients, is each thread's own
            device = next(tensors_of_inputs(self.example)).device
            cuda = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with cuda, torch.no_grad():
                if not self._unwanted:
                    call_network(self.network, self.example)
        except _EnoughError:
            pass
        except BaseException as error:
            self._error = error
        self._read, self._over = None, True
        self._there.release()

    def stand(self, layer: nn.Module, values: torch.Tensor) -> None:
        """Stay in front of ``layer`` if it is the one that is waited for."""
        if self._wanted is layer and not self._unwanted:
            self._read = values
            self._there.release()
            self._turn.acquire()
        if self._unwanted:
            raise _EnoughError

    def end(self) -> None:
        """Forget what is left."""
        self._unwanted = True
        self._turn.release()
        self.join()


@contextmanager
def forward_passes(
    network: nn.Module, layers: Iterable[nn.Module], batches: Sequence[Example]
) -> Iterator[list[ForwardPass]]:
    """A pass for each of ``batches``, in eval mode, that can stand at ``layers``."""

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        this = threading.current_thread()
        if isinstance(this, ForwardPass):
            this.stand(layer, inputs[0])

    passes = [ForwardPass(network, batch) for batch in batches]
    hooks = [(layer, hook) for layer in layers]
    with eval_with_hooks(
        network, hooks, values=False
    ):  # a narrow one's statistics may change meanwhile
        for each in passes:
            each.start()
        try:
            yield passes
        finally:
            for each in passes:
                each.end()


def standing_bytes(network: nn.Module, example: Example) -> int:
    """About the most that a pass keeps in front of a layer, of each sample like ``example``'s."""
    trace = trace_network(network, example)
    last = {id(t): n for n, op in enumerate(trace.ops) for t in op.inputs()}
    alive = {id(tensor): tensor.nbytes for tensor in trace.inputs}
    most = sum(alive.values())
    for number, op in enumerate(trace.ops):
        if op.name in READS:
            most = max(most, sum(alive.values()))
        alive |= {id(result): result.nbytes for result in op.results()}
        alive = {key: size for key, size in alive.items() if last.get(key, -1) > number}
    return most // trace.sample_count


def keeps_activations(network: nn.Module, example: Example) -> bool:
    """Whether a pass leaves what it computed where another one would find it."""
    trace = trace_network(network, example)
    results = (result for op in trace.ops for result in op.results())
    return any(
        id(tensor) in trace.constants and tensor.dim() > 1 and len(tensor) == trace.sample_count
        for tensor in (*trace.inputs, *results)
    )
