"""Forward passes that pause at a layer, so that its weights can be changed in between."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from job.slimming.graph.modes import eval_with_hooks
from job.slimming.graph.pause_points import ADDITIONS
from job.slimming.inputs import call_network, map_tensors, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import nn

    from job.slimming.inputs import Example


class _StopPassError(BaseException):
    """Ends a pass early: its remaining layers are not needed."""


@dataclass(frozen=True)
class Summands:
    """Summands of an addition: the output of a layer, possibly normalised, and another tensor.

    ``inputs`` is a copy of the input of the layer.
    """

    output: torch.Tensor
    other: torch.Tensor
    inputs: torch.Tensor


class ForwardPass(threading.Thread):
    """Forward pass of ``network`` on ``example`` that runs from one layer to a later one.

    It is a thread, whose stack keeps the state of the network's code during a pause. Only one of
    these threads runs at a time.
    """

    def __init__(
        self, network: nn.Module, example: Example, order: Mapping[nn.Module, int]
    ) -> None:
        super().__init__(daemon=True)
        self.network, self.example, self.order = network, example, order
        self._reached: set[nn.Module] = set()
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._target: tuple[str, nn.Module] | None = None
        self._values: Any = None
        self._error: BaseException | None = None
        self._finished = self._cancelled = False
        self._inputs: dict[nn.Module, torch.Tensor] = {}  # of layers before an addition
        self._outputs: dict[nn.Module, torch.Tensor] = {}
        self._replacement: torch.Tensor | None = None

    def run_until(self, layer: nn.Module) -> torch.Tensor | None:
        """Run until the next call of ``layer`` and return its input; None if there is none.

        The input is valid until the pass resumes. Exceptions of the network are raised here.
        """
        values: torch.Tensor | None = self._run_to("input", layer)
        return values

    def run_through(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Like ``run_until``, but run that call too, and return its input and output."""
        values: tuple[torch.Tensor, torch.Tensor] | None = self._run_to("output", layer)
        return values

    def run_until_added(self, layer: nn.Module) -> Summands | None:
        """Like ``run_until``, but run until the output of ``layer`` is added to another tensor."""
        values: Summands | None = self._run_to("added", layer)
        return values

    def replace_output(self, output: torch.Tensor) -> None:
        """Replace the summand that ``run_until_added`` returned by ``output``."""
        self._replacement = output

    def _run_to(self, what: str, layer: nn.Module) -> Any:
        self._target = what, layer
        if not self._finished:
            self._resume.release()
            self._paused.acquire()
        if self._error:
            raise self._error
        return self._values

    def run(self) -> None:
        """Run the forward pass of the network; called in the thread."""
        self._resume.acquire()
        try:
            # each thread has its own current device and gradient mode
            device = next(tensors_in(self.example)).device
            cuda = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with cuda, torch.no_grad(), _Additions(self):
                if not self._cancelled:
                    call_network(self.network, self.example)
        except _StopPassError:
            pass
        except BaseException as error:
            self._error = error
        self._values, self._finished = None, True
        self._inputs, self._outputs = {}, {}
        self._paused.release()

    def pause(self, what: str, layer: nn.Module, values: Any) -> None:
        """Pause and hand over ``values`` if this is where the pass is to pause."""
        if self._target == (what, layer) and not self._cancelled:
            self._hand_over(values)
        if self._cancelled:
            raise _StopPassError

    def pause_before(self, layer: nn.Module, values: torch.Tensor) -> None:
        """Pause before ``layer`` if the pass is to pause there, or has missed its target.

        A target is missed if the network uses the weight of the layer without calling the layer.
        """
        self._reached.add(layer)
        while not self._cancelled and self._has_missed_target(layer):
            self._hand_over(None)
        self.pause("input", layer, values)

    def _has_missed_target(self, layer: nn.Module) -> bool:
        target = self._target[1] if self._target else layer
        return target not in self._reached and self.order[target] < self.order[layer]

    def _hand_over(self, values: Any) -> None:
        self._values = values
        del values
        self._paused.release()
        self._resume.acquire()
        self._values = None

    def keep_input(self, layer: nn.Module, values: torch.Tensor) -> None:
        """Keep a copy of the input of ``layer`` until its output is added."""
        self._inputs[layer] = values.clone()

    def keep_output(self, layer: nn.Module, values: torch.Tensor) -> None:
        """Remember ``values`` as the output of ``layer``, to recognise it when it is added."""
        self._outputs[layer] = values

    def at_addition(self, summands: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pause if one of two summands is the output of a layer; returns the summands to add."""
        for layer, output in list(self._outputs.items()):
            place = next((n for n, value in enumerate(summands) if value is output), None)
            if place is None or layer not in self._inputs:
                continue
            del self._outputs[layer]
            values = Summands(output, summands[1 - place], self._inputs.pop(layer))
            self.pause("added", layer, values)
            if self._replacement is not None:
                pair = [summands[1 - place]] * 2
                pair[place], self._replacement = self._replacement, None
                return tuple(pair)
        return summands

    def cancel(self) -> None:
        """End the pass without running its remaining layers."""
        self._cancelled = True
        self._resume.release()
        self.join()


class _Additions(TorchFunctionMode):
    """Mode that reports each addition of two values to a pass."""

    def __init__(self, forward_pass: ForwardPass) -> None:
        super().__init__()
        self.forward_pass = forward_pass

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ in ADDITIONS and len(args) == 2:
            args = self.forward_pass.at_addition(args)
        return func(*args, **(kwargs or {}))


@contextmanager
def contiguous_weights(network: nn.Module) -> Iterator[None]:
    """Store the weights of convolutions in the default memory format within the context.

    cuDNN prepares a channels-last convolution again in every thread. A pass of StudentNet on an
    H100 took 1 to 4 s, compared with 0.05 s in the default format.
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
    """Return the strides of the default format; ``is_contiguous`` ignores axes of size 1."""
    return torch.empty(tensor.shape, device="meta").stride()


@contextmanager
def forward_passes(
    network: nn.Module,
    layers: Iterable[nn.Module],
    summands: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
) -> Iterator[Callable[[Example], ForwardPass]]:
    """Yield a function that starts a forward pass on a batch, in eval mode.

    A pass can pause before and after each of ``layers``, which are in the order of their calls, and
    at the addition of the output of a layer in ``summands``. This maps the layer to the module
    whose output is added: the layer itself or the BatchNorm after it.
    """
    passes: list[ForwardPass] = []
    # buffer values are not restored: the statistics of a narrow network may change in a pause
    layout: AbstractContextManager[None] = nullcontext()
    on_gpu = any(parameter.is_cuda for parameter in network.parameters())
    if on_gpu:
        layout = contiguous_weights(network)

    def start(batch: Example) -> ForwardPass:
        batch = map_tensors(batch, torch.Tensor.contiguous) if on_gpu else batch
        passes.append(ForwardPass(network, batch, order))
        passes[-1].start()
        return passes[-1]

    layers = list(layers)
    order = {layer: number for number, layer in enumerate(layers)}
    hooks = [(layer, partial(_before, keep=layer in summands)) for layer in layers]
    with layout, eval_with_hooks(network, hooks, values=False):
        for layer, _ in hooks:
            layer.register_forward_hook(_after)
        for layer, module in summands.items():
            module.register_forward_hook(partial(_before_addition, of=layer))
        try:
            yield start
        finally:
            for forward_pass in passes:
                forward_pass.cancel()


def _before(layer: nn.Module, inputs: tuple[torch.Tensor, ...], keep: bool) -> None:
    thread = threading.current_thread()
    if isinstance(thread, ForwardPass):
        thread.pause_before(layer, inputs[0])
        if keep:
            thread.keep_input(layer, inputs[0])


def _after(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    thread = threading.current_thread()
    if isinstance(thread, ForwardPass):
        thread.pause("output", layer, (inputs[0], output))


def _before_addition(_: nn.Module, __: object, output: torch.Tensor, of: nn.Module) -> None:
    thread = threading.current_thread()
    if isinstance(thread, ForwardPass):
        thread.keep_output(of, output)
