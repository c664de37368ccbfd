"""Forward passes that compute only the layers after some point and replay the earlier ones."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from job.slimming.graph.layers import SUMMING, modules_of
from job.slimming.inputs import call_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from job.slimming.inputs import Example

MAX_RECORDED_BYTES = 2**31  # of the outputs recorded for one batch


class Replay:
    """Recorded outputs of a network's modules on one batch, to be replayed in later passes.

    A later pass differs from the recorded one only from some layer on. Layers are modules of
    torch.nn, and convolutions and linear layers with code of their own. Earlier layers that are
    called once return their recorded output, and so do earlier blocks, i.e. modules of any other
    kind that return a tensor, if ``blocks``. Functions between them are computed again.
    """

    def __init__(self, network: nn.Module, example: Example, *, blocks: bool = True) -> None:
        self.network, self.example = network, example
        modules = modules_of(network, once=True)
        self.layers = {name: module for name, module in modules.items() if _is_layer(module)}
        self.modules = dict(self.layers)
        if blocks:
            self.modules |= {name: m for name, m in modules.items() if name and _is_block(m)}
        self.order: list[str] = []  # names of the layers in the order of the calls
        self.ends: dict[str, int] = {}  # how many calls of layers had ended when a module ended
        self.outputs = self._record()

    def _record(self) -> Any:
        """Run the network and record the outputs of modules, up to ``MAX_RECORDED_BYTES``."""
        free_bytes, calls = MAX_RECORDED_BYTES, Counter[str]()
        recorded: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
        # a block often returns what a layer returned; the outputs live, so that ids are unique
        copies: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

        def recording(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                nonlocal free_bytes
                output = forward(*args, **kwargs)
                calls[name] += 1
                if name in self.layers:
                    self.order.append(name)
                self.ends[name] = len(self.order)
                if not isinstance(output, torch.Tensor):
                    return output
                key = id(output), output._version
                if key not in copies and output.nbytes <= free_bytes:
                    free_bytes -= output.nbytes
                    copies[key] = output, output.clone()
                if key in copies:
                    recorded[name] = *copies[key], output._version
                return output

            return record

        with _forwards(
            {name: recording(name, m.forward) for name, m in self.modules.items()}, self.modules
        ):
            outputs = call_network(self.network, self.example)
        recorded = {name: record for name, record in recorded.items() if calls[name] == 1}
        # an output that a later op changes in place is copied for each pass
        self.changed = {
            name for name, (live, _, version) in recorded.items() if live._version != version
        }
        self.recorded = {name: copy for name, (_, copy, _) in recorded.items()}
        return outputs

    def first_call(self, uses: Mapping[str, int]) -> int:
        """Return the index of the first call of any of the layers in ``uses``.

        ``uses`` maps a layer to the number of ops on its weight. The index is 0 where the calls of
        one of them are not observed, or fewer.
        """
        calls = Counter(self.order)
        if any(name not in self.layers or calls[name] < count for name, count in uses.items()):
            return 0
        return next((n for n, name in enumerate(self.order) if name in uses), len(self.order))

    def run_from(self, index: int) -> Any:
        """Return the outputs of a pass in which the calls before ``index`` are replayed."""

        def replaying(name: str) -> Callable[..., torch.Tensor]:
            output, copies = self.recorded[name], name in self.changed
            return lambda *_args, **_kwargs: output.clone() if copies else output

        earlier = [name for name in self.recorded if self.ends[name] <= index]
        with _forwards({name: replaying(name) for name in earlier}, self.modules):
            return call_network(self.network, self.example)


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer that can be replayed, with its class's forward pass."""
    is_torch = type(module).__module__.startswith("torch.nn.modules.") and not module._modules
    return (is_torch or isinstance(module, SUMMING)) and "forward" not in module.__dict__


def _is_block(module: nn.Module) -> bool:
    """Return whether a module has code of its own and nothing that observes the modules in it."""
    observed = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return not (observed or _is_layer(module) or "forward" in module.__dict__)


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
