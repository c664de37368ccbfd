"""Cost model: exact costs of a planned cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from job.slimming.graph.layers import (
    CONVOLUTIONS,
    INPUT_WEIGHTS,
    constants_of,
    modules_of,
    owner_of,
    tensors_of,
    weight_rows,
)
from job.slimming.graph.selection import batchnorms
from job.slimming.planning.cost import COST_METRICS, Cost, count_channels, counted_layers
from job.slimming.planning.plan import folded_norm

if TYPE_CHECKING:
    import torch

    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.latency.network_latency import NetworkLatency

SlotNumbers = dict[tuple[str, str], int]  # by layer and side; from 1
INDEX_BYTES = 8  # of one entry in the int64 indices of a BatchNorm that selects its channels


class CostModel:
    """Costs of ``network`` as functions of the channels kept; the narrow network is not built.

    The size of a tensor is proportional to the product of the channels in its two channel slots.
    Slot 0 is for axes that are never cut. Layers in ``gains_bias`` get a bias as soon as one of
    their inputs is cut, other layers when all of them are. Arrays are indexed by slot (slots,) or
    by tensor (tensors,). Without ``removals`` costs at no channel are those of the channels alone:
    layers without inputs or outputs are not replaced. ``latency`` predicts the time.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: ChannelGraph,
        gains_bias: frozenset[str] = frozenset(),
        *,
        removals: bool = True,
        latency: NetworkLatency | None = None,
    ) -> None:
        self.latency = latency
        numbers: SlotNumbers = {
            (slot.layer, slot.side): n for n, slot in enumerate(graph.slots, start=1)
        }
        self._collect_slots(graph)
        self._size_tensors(network, graph, numbers)
        self._find_owners(network, graph, numbers)
        self._count_channels(network, numbers)
        self._count_biases(network, gains_bias, numbers)
        if not removals:  # slot 0 always has a channel
            for slots in (self.through_owner, self.folding_owner, self.folding_norms):
                slots[:] = 0
            self.bias_below[~self.gains] = 0

    def _collect_slots(self, graph: ChannelGraph) -> None:
        slots = [np.zeros(1, np.int64), *(slot.ids for slot in graph.slots)]
        self.ids = np.concatenate(slots)
        self.lengths = np.array([len(ids) for ids in slots])
        self.starts = np.cumsum(self.lengths) - self.lengths

    def _size_tensors(self, network: nn.Module, graph: ChannelGraph, numbers: SlotNumbers) -> None:
        tensors, keys = _named_tensors(network)
        order = {name: number for number, name in enumerate(tensors)}
        layers = {layer for layer, _ in numbers}
        slots = [_slots_of_tensor(name, t, numbers, layers) for name, t in tensors.items()]
        self.first, self.second = np.array(slots, np.int64).reshape(-1, 2).T
        self.full = self.lengths[self.first] * self.lengths[self.second]
        self.numel = np.array([tensor.numel() for tensor in tensors.values()], np.int64)
        is_param = [isinstance(tensor, nn.Parameter) for tensor in tensors.values()]
        self.is_param = np.array(is_param, np.int64)
        self.bytes = np.zeros(len(tensors), np.int64)  # of an element, for each state-dict key
        for name in keys.values():
            self.bytes[order[name]] += tensors[name].element_size()
        self.macs = np.zeros(len(tensors))  # for each element of a weight
        self.other_macs = sum(call.places for call in graph.calls if call.weight is None)
        for call in graph.calls:
            if call.weight is not None:
                self.macs[order[call.weight]] += call.places

    def _find_owners(self, network: nn.Module, graph: ChannelGraph, numbers: SlotNumbers) -> None:
        """Find two slots for each tensor; its layer is removed if one of them has no channel.

        For a tensor of a BatchNorm they are the channels of the BatchNorm, and the inputs of the
        layer that it is folded into. For other tensors both are slot 0, which is never empty.
        """
        self.folded = {
            norm: numbers[layer, "in"]
            for layer, side in numbers
            if side == "in" and (norm := folded_norm(graph, layer))
        }
        norms = batchnorms(network)
        owners = np.zeros((len(self.numel), 2), np.int64)
        for place, name in enumerate(_named_tensors(network)[0]):
            norm = owner_of(name)
            if norm in norms:
                through = _passed(norm.removesuffix(".norm"), numbers) or _passed(norm, numbers)
                owners[place] = through, self.folded.get(norm, 0)
        self.through_owner, self.folding_owner = owners.T

    def _count_channels(self, network: nn.Module, numbers: SlotNumbers) -> None:
        passed = [(s, n) for s, n in numbers.items() if s[1] in ("through", "select")]
        norms, counted = batchnorms(network), counted_layers(network)
        convolutions = {n for n, m in modules_of(network).items() if isinstance(m, CONVOLUTIONS)}
        sides = ("through", "select", "out")
        cut = {name: n for (name, side), n in numbers.items() if name in counted and side in sides}
        by_slot = sorted((n, self.folded.get(name, 0)) for name, n in cut.items())
        self.norms = np.array([n for n, _ in by_slot], np.int64)
        uncut = {name: slot for name, slot in self.folded.items() if name not in cut}
        self.uncut_norms = np.array([norms[name].num_features for name in uncut], np.int64)
        folding = [slot for _, slot in by_slot] + list(uncut.values())
        self.folding_norms = np.array(folding, np.int64)  # of norms, then of uncut_norms
        total = count_channels(network)
        self.other_channels = total - int(self.lengths[self.norms].sum())
        new = [n for (name, side), n in passed if side == "select" and f"{name}.norm" not in norms]
        new += [n for s, n in numbers.items() if s[1] == "places" and s[0] in convolutions]
        self.selecting = np.array(new, np.int64)  # these layers get indices

    def _count_biases(
        self, network: nn.Module, gains_bias: frozenset[str], numbers: SlotNumbers
    ) -> None:
        modules = modules_of(network)
        layers = sorted(
            layer
            for layer, side in numbers
            if side == "in" and layer in modules and getattr(modules[layer], "bias", True) is None
        )
        weights = [weight_rows(modules[layer]) for layer in layers]
        self.bias_inputs = np.array([numbers[layer, "in"] for layer in layers], np.int64)
        outputs = [numbers.get((layer, "out"), 0) for layer in layers]
        self.bias_outputs = np.array(outputs, np.int64)
        rows = [1 if slot else len(w) for slot, w in zip(outputs, weights, strict=True)]
        self.bias_rows = np.array(rows, np.int64)
        self.bias_bytes = np.array([w.element_size() for w in weights], np.int64)
        # with fewer inputs than these the layer has a bias
        full = self.lengths[self.bias_inputs]
        self.gains = np.array([layer in gains_bias for layer in layers], bool)
        self.bias_below = np.where(self.gains, full, 1)

    def cost(self, keep: Ids) -> Cost:
        """Return the cost with the channels of the mask ``keep`` (count,); keep[0] is true."""
        counts = self.slot_counts(keep)
        return Cost(**{metric: self._count(metric, counts) for metric in COST_METRICS})

    def slot_counts(self, keep: Ids) -> Ids:
        """Return how many channels of the mask ``keep`` (count,) each slot has, as (slots,)."""
        counts: Ids = np.add.reduceat(keep[self.ids].astype(np.int64), self.starts)
        return counts

    def metric(self, metric: str, counts: Ids) -> float:
        """Return one of ``COST_METRICS``, or the latency in seconds, with ``counts`` (slots,)."""
        if metric == "latency":
            assert self.latency
            return self.latency.seconds(counts)
        return self._count(metric, counts)

    def _count(self, metric: str, counts: Ids) -> int:
        if metric == "channels":
            there = counts[self.folding_norms] > 0
            cut = int((counts[self.norms] * there[: len(self.norms)]).sum())
            return cut + self.other_channels - int(self.uncut_norms @ ~there[len(self.norms) :])
        numel = self.numel * (counts[self.first] * counts[self.second]) // self.full
        numel *= (counts[self.through_owner] > 0) & (counts[self.folding_owner] > 0)
        if metric == "macs":
            return round(float(numel @ self.macs) + self.other_macs)
        is_cut = counts[self.bias_inputs] < self.bias_below
        biases = self.bias_rows * counts[self.bias_outputs] * is_cut
        if metric == "params":
            return int(numel @ self.is_param + biases.sum())
        selected = counts[self.selecting]
        indices = int(selected[selected < self.lengths[self.selecting]].sum())
        return int(numel @ self.bytes + biases @ self.bias_bytes) + indices * INDEX_BYTES


def _named_tensors(network: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return all tensors by name, shared ones once, and names by state-dict key.

    These are parameters, buffers, and constants in other attributes, e.g. kernels that blur.
    """
    name_of: dict[int, str] = {}
    tensors = {
        name: tensor
        for name, _, _, tensor in tensors_of(network)
        if name_of.setdefault(id(tensor), name) == name
    }
    tensors |= {n: t for n, t in constants_of(network) if name_of.setdefault(id(t), n) == n}
    state: dict[str, object] = network.state_dict(keep_vars=True)
    keys = {key: name_of[id(value)] for key, value in state.items() if id(value) in name_of}
    return tensors, keys


def _passed(layer: str, numbers: SlotNumbers) -> int:
    """Return the slot of channels that pass through or are selected by a layer; 0 for none."""
    return next((n for s in ("through", "select") if (n := numbers.get((layer, s), 0))), 0)


def _slots_of_tensor(
    name: str, tensor: torch.Tensor, numbers: SlotNumbers, layers: set[str]
) -> tuple[int, int]:
    """Return the two slots that the size of a tensor is proportional to."""
    layer, _, own_name = name.rpartition(".")
    if own_name == "num_batches_tracked":
        return 0, 0
    if (layer.removesuffix(".norm"), "select") in numbers:
        layer = layer.removesuffix(".norm")
    bare = layer not in layers  # a parameter or buffer that no known layer owns
    if bare:
        if name not in layers:
            return 0, 0
        layer = name
    through = _passed(layer, numbers)
    if own_name == "indices":
        through = through or numbers.get((layer, "places"), 0)
    if through:
        return through, 0
    own_weight = own_name in ("weight", "in_proj_weight", *INPUT_WEIGHTS)
    is_weight = bare or (own_weight and isinstance(tensor, nn.Parameter))
    return numbers.get((layer, "out"), 0), numbers.get((layer, "in"), 0) if is_weight else 0
