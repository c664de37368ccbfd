"""What removed channels used to add is given to those that stay, and to a constant.

``beta``: what is left of a channel whose γ is 0, act(β), becomes part of its readers' biases (Liu
et al. 2017 drop it). ``mean``: its mean over calibration pictures. For ``regress`` see
job.slimming.compensation.regression.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from job.slimming.calibration.moments import collect, readers
from job.slimming.graph.layers import owner_of
from job.slimming.graph.selection import batchnorms, unwrap_selection
from job.slimming.graph.trace import trace_network
from job.slimming.inputs import move_like
from job.slimming.planning.layer_channels import LayerChannels
from job.slimming.surgery.clone import clone_module
from job.slimming.surgery.verification import probe_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from job.slimming.calibration.moments import Moments, Reader
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.inputs import Example
    from job.slimming.planning.layer_channels import Layers

METHODS = ("none", "beta", "mean", "regress")
Fit = tuple[torch.Tensor, torch.Tensor]


def with_biases(layers: Layers, unbiased: frozenset[str]) -> Layers:
    """``layers`` with a new bias for each of ``unbiased`` that reads fewer channels."""
    found = dict(layers)
    for layer in sorted(unbiased):
        kept = layers.get(layer, LayerChannels())
        if kept.in_ is not None:
            found[layer] = replace(kept, bias=True)
    return found


def without_constant(network: nn.Module, graph: ChannelGraph, example: Example) -> frozenset[str]:
    """Readers that have neither a bias nor a BatchNorm right behind them: a constant needs one.

    ``example`` is like what the network takes.
    """
    norms = norms_behind(network, example)
    layers = {reader.layer for reader in readers(network, graph)} - norms.keys()
    return frozenset(la for la in layers if network.get_submodule(la).bias is None)


def norms_behind(network: nn.Module, example: Example) -> dict[str, tuple[str, ...]]:
    """For each convolution or linear layer the BatchNorms that alone read what it writes.

    Layers whose outputs also go elsewhere, and BatchNorms that other layers feed too, are left out.
    """
    trace = trace_network(network, example)
    makers: dict[int, str] = {}  # by id of the activation
    feeds: dict[str, set[str | None]] = {}  # who reads a layer's outputs; None: no BatchNorm
    fed: dict[str, set[str | None]] = {}
    for op in trace.ops:
        norm = None
        if op.name == "batch_norm":
            norm = trace.name(op.argument(1, "running_mean"))
            maker = makers.get(id(op.argument(0, "input")))
            fed.setdefault(owner_of(norm or ""), set()).add(maker)
        for tensor in op.inputs():
            if id(tensor) in makers:
                feeds.setdefault(makers[id(tensor)], set()).add(owner_of(norm) if norm else None)
        for result in op.results():
            makers.pop(id(result), None)
        weight = trace.name(op.argument(1, "weight"))
        if op.name in ("conv1d", "conv2d", "conv3d", "linear") and weight:
            makers[id(op.result)] = owner_of(weight)
    for output in trace.outputs:
        if id(output) in makers:
            feeds.setdefault(makers[id(output)], set()).add(None)
    return {
        layer: tuple(sorted(norm for norm in norms if norm))
        for layer, norms in feeds.items()
        if None not in norms and all(fed[norm or ""] == {layer} for norm in norms)
    }


def fold_means(
    wide: nn.Module,
    narrow: nn.Module,
    graph: ChannelGraph,
    keep: Ids,
    layers: Layers,
    means: Mapping[str, Moments],
    example: Example,
) -> None:
    """Let the readers in ``narrow`` add the mean of the channels outside ``keep`` (count,).

    ``narrow`` is ``wide`` cut to ``layers``, as ``with_biases`` gave them. ``means`` are moments by
    reader; readers without are left alone.
    """
    norms = norms_behind(narrow, example)
    for reader in readers(wide, graph):
        if reader.layer not in means or keep[reader.channels].all():
            continue
        fits = []
        for part, stays in columns_of(reader, keep):
            constant = torch.where(stays, 0, means[reader.layer].mean[part])
            fits.append((torch.eye(len(stays)).double()[:, stays], constant))
        rebuild(wide, narrow, reader, layers, fits, norms)


def columns_of(reader: Reader, keep: Ids) -> Iterator[tuple[slice, torch.Tensor]]:
    """The columns of each group of a reader, and (columns,) bool which of them stay."""
    size = len(reader.channels) // reader.groups
    for group in range(reader.groups):
        part = slice(group * size, (group + 1) * size)
        yield part, torch.from_numpy(keep[reader.channels[part]])


def rebuild(
    wide: nn.Module,
    narrow: nn.Module,
    reader: Reader,
    layers: Layers,
    fits: Sequence[Fit],
    norms: Mapping[str, tuple[str, ...]],
) -> None:
    """Give a reader in ``narrow`` the weights that make up for what it no longer reads.

    ``fits`` are, for each group, M (C, K) and b (C,): what it read in ``wide`` is M · now + b.
    ``norms`` are as ``norms_behind`` gave them.
    """
    weight, kept = reader.weight(wide), layers.get(reader.layer, LayerChannels()).out
    rows = torch.arange(len(weight)) if kept is None else torch.tensor(kept)
    outputs = len(weight) // reader.groups
    weights, constants = [], []
    for group, (slope, constant) in enumerate(fits):
        own = weight[rows[rows // outputs == group]]
        weights.append(torch.einsum("ocp,ck->okp", own, slope))
        constants.append(own.sum(2) @ constant)
    added = torch.cat(constants)
    with torch.no_grad():
        layer: Any = narrow.get_submodule(reader.layer)
        layer.weight.copy_(torch.cat(weights).view(layer.weight.shape))
        if layer.bias is not None:
            bias = getattr(wide.get_submodule(reader.layer), "bias", None)
            old = 0 if bias is None else bias.detach().cpu().double()[rows]
            layer.bias.copy_(old + added)
            return
        for norm in norms.get(reader.layer, ()):
            now: Any = unwrap_selection(narrow.get_submodule(norm))
            then: Any = unwrap_selection(wide.get_submodule(norm))
            if now.running_mean is not None:  # else each batch hides any constant
                now.running_mean.copy_(then.running_mean.cpu().double()[rows] - added)


def betas(
    network: nn.Module, graph: ChannelGraph, keep: Ids, example: Example
) -> dict[str, Moments]:
    """Moments by reader when the γ of the channels outside ``keep`` (count,) are 0.

    What their BatchNorms still add is β, whatever the picture: noise like ``example`` is what runs.
    """
    still = clone_module(network, {})
    norms = batchnorms(still)
    for position in graph.slots:
        gone = ~keep[position.ids]
        if position.side not in ("through", "select") or not gone.any():
            continue
        norm = norms.get(position.layer)  # None: a depthwise convolution, a PReLU
        if norm is not None and norm.weight is not None:
            with torch.no_grad():
                norm.weight[torch.from_numpy(gone).to(norm.weight.device)] = 0
    return collect(still, graph, [(move_like(probe_batch(example), _floating(network)), None)])


def _floating(network: nn.Module) -> torch.Tensor:
    return next(p for p in network.parameters() if p.is_floating_point())
