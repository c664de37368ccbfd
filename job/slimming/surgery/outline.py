"""Outlines of networks: their modules with numbers and shapes, without values or code.

An outline takes little memory, and does not keep the network alive. A network that is built from it
can be cut like the original, but does not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.slimming.graph.layers import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUMBERS = frozenset([bool, int, float, str, type(None), torch.dtype])
LISTS = frozenset([tuple, list, torch.Size])
PARAMETERS, BUFFERS, ATTRIBUTES = "_parameters", "_buffers", ""


@dataclass(frozen=True)
class TensorOutline:
    """Shape and kind of a tensor of a network."""

    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool


@dataclass(frozen=True)
class ModuleOutline:
    """Class of a module, its attributes that are numbers, its tensors, and its children.

    ``tensors`` are given by the dict that contains them, the key in it, and their number;
    ``children`` by their name and number. Numbers are those in the outline of the network.
    """

    kind: Any
    numbers: dict[str, Any]
    tensors: list[tuple[str, str, int | None]]
    children: dict[str, int | None]


@dataclass(frozen=True)
class NetworkOutline:
    """Outlines of the modules of a network, the network first, and of their tensors."""

    modules: list[ModuleOutline]
    tensors: list[TensorOutline]

    def build(self, values: Callable[[TensorOutline], torch.Tensor]) -> nn.Module:
        """Return a network with new tensors that ``values`` gives for those of the original."""
        tensors = [values(tensor) for tensor in self.tensors]
        built: list[Any] = [each.kind.__new__(each.kind) for each in self.modules]
        for module, outline in zip(built, self.modules, strict=True):
            nn.Module.__init__(module)
            attributes = vars(module)
            attributes |= outline.numbers
            for store, key, number in outline.tensors:
                space = attributes[store] if store else attributes
                space[key] = None if number is None else tensors[number]
            for key, number in outline.children.items():
                attributes["_modules"][key] = None if number is None else built[number]
        network: nn.Module = built[0]
        return network


def outline_of(network: nn.Module) -> NetworkOutline:
    """Return the outline of a network."""
    modules = list(modules_of(network, once=True).values())
    numbers = {id(module): number for number, module in enumerate(modules)}
    tensors: dict[int, tuple[int, TensorOutline]] = {}

    def number_of(tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            is_parameter = isinstance(tensor, nn.Parameter)
            outline = TensorOutline(tensor.shape, tensor.dtype, is_parameter)
            tensors[id(tensor)] = len(tensors), outline
        return tensors[id(tensor)][0]

    outlines = [
        ModuleOutline(
            type(module),
            dict(_numbers(module)),
            [(store, key, number_of(tensor)) for store, key, tensor in _tensors(module)],
            {
                key: None if child is None else numbers[id(child)]
                for key, child in module._modules.items()
            },
        )
        for module in modules
    ]
    return NetworkOutline(outlines, [outline for _, outline in tensors.values()])


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        kind = type(value)
        if kind in NUMBERS or (kind in LISTS and all(type(part) in NUMBERS for part in value)):
            yield name, list(value) if kind is list else value


def _tensors(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor | None]]:
    """Yield the parameters, the buffers and the tensors in other attributes of a module."""
    for store, space in ((PARAMETERS, module._parameters), (BUFFERS, module._buffers)):
        for key, tensor in space.items():
            yield store, key, tensor
    for key, value in vars(module).items():
        if type(value) is torch.Tensor:
            yield ATTRIBUTES, key, value
