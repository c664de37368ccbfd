"""Forward passes that compute only the layers after some point and replay the earlier ones."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from job.slimming.graph.layers import SUMMING, modules_of
from job.slimming.inputs import call_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from job.slimming.inputs import Example

MAX_RECORDED_BYTES = 2**31  # of the outputs recorded for one batch


class Replay:
    """Recorded outputs of a network's layers on one batch, to be replayed in later passes.

    A later pass differs from the recorded one only from some layer on. Earlier layers that are
    called once return their recorded output: those of torch.nn, and convolutions and linear layers
    with code of their own. Functions between layers are computed again.
    """

    def __init__(self, network: nn.Module, example: Example) -> None:
        self.network, self.example = network, example
        self.modules = {
            name: module
            for name, module in modules_of(network, once=True).items()
            if _is_layer(module)
        }
        self.order: list[str] = []  # names of the layers in the order of the calls
        self.outputs = self._record()

    def _record(self) -> Any:
        """Run the network and record the outputs of its layers, up to ``MAX_RECORDED_BYTES``."""
        free_bytes = MAX_RECORDED_BYTES
        recorded: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}

        def recording(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                nonlocal free_bytes
                output = forward(*args, **kwargs)
                self.order.append(name)
                if isinstance(output, torch.Tensor) and output.nbytes <= free_bytes:
                    free_bytes -= output.nbytes
                    recorded[name] = output, output.clone(), output._version
                return output

            return record

        with _forwards(
            {name: recording(name, m.forward) for name, m in self.modules.items()}, self.modules
        ):
            outputs = call_network(self.network, self.example)
        calls = Counter(self.order)
        recorded = {name: record for name, record in recorded.items() if calls[name] == 1}
        # an output that a later op changes in place is copied for each pass
        self.changed = {
            name for name, (live, _, version) in recorded.items() if live._version != version
        }
        self.recorded = {name: copy for name, (_, copy, _) in recorded.items()}
        return outputs

    def first_call(self, layers: set[str]) -> int:
        """Return the index of the first call of any of ``layers``, or the number of calls.

        It is 0 where calls of one of them are not observed.
        """
        if not layers <= self.modules.keys():
            return 0
        return next((n for n, name in enumerate(self.order) if name in layers), len(self.order))

    def run_from(self, index: int) -> Any:
        """Return the outputs of a pass in which the calls before ``index`` are replayed."""

        def replaying(name: str) -> Callable[..., torch.Tensor]:
            output, copies = self.recorded[name], name in self.changed
            return lambda *_args, **_kwargs: output.clone() if copies else output

        earlier = [name for name in self.order[:index] if name in self.recorded]
        with _forwards({name: replaying(name) for name in earlier}, self.modules):
            return call_network(self.network, self.example)


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer that can be replayed, with its class's forward pass."""
    is_torch = type(module).__module__.startswith("torch.nn.modules.") and not module._modules
    return (is_torch or isinstance(module, SUMMING)) and "forward" not in module.__dict__


@contextmanager
def _forwards(
    forwards: dict[str, Callable[..., Any]], modules: dict[str, nn.Module]
) -> Iterator[None]:
    """Replace the forward functions of modules, by name, within the context."""
    for name, forward in forwards.items():
        modules[name].__dict__["forward"] = forward
    try:
        yield
    finally:
        for name in forwards:
            del modules[name].__dict__["forward"]
