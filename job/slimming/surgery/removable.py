"""Removable groups: channel groups that may keep no channel, so that branches are removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.errors import DataError, UsageError
from job.slimming.graph.data_flow import DataFlow
from job.slimming.graph.layers import BATCHNORM, modules_of
from job.slimming.graph.modes import training_mode
from job.slimming.graph.removed_layers import can_be_replaced
from job.slimming.graph.selection import SelectedChannels
from job.slimming.graph.snapshot import preserve_state
from job.slimming.inputs import call_network, map_tensors, tensors_in
from job.slimming.planning.plan import layers_of
from job.slimming.surgery.clone import clone_to
from job.slimming.surgery.probe import probe_batch, smallest_equivalent_input
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from job.slimming.graph.groups import ChannelGraph, ChannelGroup
    from job.slimming.inputs import Example


def removable_groups(network: nn.Module, graph: ChannelGraph, example: Example) -> frozenset[str]:
    """Return the names of the channel groups that may keep no channel, alone or together.

    Without these groups every output still depends on the input of the network. If one of several
    paths must be kept, it is the last one. The groups that are removed with a group
    (``DataFlow.closure``) are removable too. Raises UsageError or DataError if no cut of the
    network can be verified.
    """
    flow, modules = DataFlow(graph), modules_of(network)
    replaceable = {group.name for group in graph.groups if _is_replaceable(group, modules)}
    names: list[str] = []
    for group in graph.groups:
        removed = flow.closure((*names, group.name))
        if removed <= replaceable and flow.outputs_depend(removed):
            names.append(group.name)
    if not names:
        return frozenset()
    example = smallest_equivalent_input(network, example, graph)
    trial = _Trial(network, graph, flow, example)
    return frozenset(_verified(trial, names, []))


def _is_replaceable(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether all producers and consumers of the channels can be replaced."""
    for layer, side in group.slots:
        module = modules.get(layer)
        if module is None:
            if side in ("in", "out"):  # a parameter without a supported layer
                return False
        elif not (can_be_replaced(module) or isinstance(module, (BATCHNORM, SelectedChannels))):
            return False
    return True


class _Trial:
    """Trial removals of channel groups of one network."""

    def __init__(
        self, network: nn.Module, graph: ChannelGraph, flow: DataFlow, example: Example
    ) -> None:
        self.network, self.graph, self.flow, self.example = network, graph, flow, example
        self.varying = _varying(network, example)

    def is_verified(self, names: list[str]) -> bool:
        """Return whether the joint removal of groups is verified, and the outputs still vary."""
        keep = ~self.flow.channels_of(self.flow.closure(names))
        layers = layers_of(self.graph, keep)
        try:
            narrow = apply_plan(self.network, layers)
            verify(self.network, narrow, layers, self.example, self.graph)
            varying = _varying(narrow, self.example)
        except (UsageError, DataError):
            raise
        except Exception:  # user code may raise anything when it gets fewer channels
            return False
        pairs = zip(self.varying, varying, strict=True)
        return all(bool((after | ~before).all()) for before, after in pairs)


def _verified(trial: _Trial, names: list[str], base: list[str]) -> list[str]:
    """Return ``base`` and the ``names`` that can be removed with it; earlier ones have priority."""
    if trial.is_verified([*base, *names]):
        return [*base, *names]
    if len(names) == 1:
        return base
    half = len(names) // 2
    return _verified(trial, names[half:], _verified(trial, names[:half], base))


def _varying(network: nn.Module, example: Example) -> list[torch.Tensor]:
    """Return for each output the mask (C,) of the channels that differ between two inputs."""
    try:
        return _varying_in(torch.float64, network, example)
    except Exception:  # user code may require float32
        return _varying_in(None, network, example)


def _varying_in(
    dtype: torch.dtype | None, network: nn.Module, example: Example
) -> list[torch.Tensor]:
    copy = clone_to(network, "cpu", dtype).cpu()
    batch = probe_batch(example, dtype or torch.float32)
    results = []
    for inputs in (batch, map_tensors(batch, _inverted)):
        with preserve_state(copy), training_mode(copy, training=False), torch.no_grad():
            results.append([t.clone() for t in tensors_in(call_network(copy, inputs))])
    return [_differing(*pair) for pair in zip(*results, strict=True)]


def _inverted(noise: torch.Tensor) -> torch.Tensor:
    return 1 - noise if noise.is_floating_point() else noise


def _differing(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if one.dim() < 2:
        return (one != other).any()[None]
    return (one != other).transpose(0, 1).flatten(1).any(1)
