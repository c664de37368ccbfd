"""Half of every channel group, cut by Gammaslim, by Torch-Pruning, and by torch-kirigami."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peer_check
import torch
from peer_networks import Case
from torch import nn

import job
import job.slimming.proven_plan
from job.errors import GammaslimError, UsageError
from job.slimming.inputs import tensors_in

HALF = 0.5
VIEWS = ("TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "UnsafeViewBackward")
LAYERS = ("ConvolutionBackward", "AddmmBackward", "MmBackward", "BmmBackward", "LinearBackward")


class RefusedError(Exception):
    """A tool says that it does not cut this network."""


@dataclass(frozen=True)
class Cut:
    """A cut network, the CPU seconds of the tool, and more columns of its row."""

    network: nn.Module
    seconds: float
    more: dict[str, Any]


def by_gammaslim(case: Case) -> Cut:
    """Cut with the proof, and compare with the wide network without its verification."""
    proof = [0.0]
    began = time.process_time()
    try:
        with _timed_proof(proof):
            narrow, plan = job.slim(
                case.network, case.example, policy="uniform", target=f"width={HALF}",
                forward=case.forward,
            )  # fmt: skip
    except UsageError as error:
        raise RefusedError(str(error)) from error
    seconds = time.process_time() - began
    wide = peer_check.without_channels(case.network, plan.layers)
    images = torch.rand(2, *case.example.shape[1:], generator=torch.Generator().manual_seed(1))
    expected = peer_check.outputs64(wide, case.run, images)
    whole = peer_check.outputs64(case.network, case.run, images)
    blocked = {f"{b.layer}: {b.reason}"[:200]: b.channels for b in plan.blocked}
    more = {
        "proof_seconds": round(proof[0], 3),
        "proof_error": plan.proof.error if plan.proof else None,
        "error": peer_check.difference(peer_check.outputs64(narrow, case.run, images), expected),
        "effect": peer_check.difference(whole, expected),
        "blocked": dict(sorted(blocked.items(), key=lambda item: -item[1])[:6]),
    }
    return Cut(narrow, seconds, more)


@contextmanager
def _timed_proof(spent: list[float]) -> Iterator[None]:
    """Add the CPU seconds of the final verification to ``spent``."""
    verify = job.slimming.proven_plan.verify

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return verify(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - began

    job.slimming.proven_plan.verify = timed
    try:
        yield
    finally:
        job.slimming.proven_plan.verify = verify


def by_torch_pruning(case: Case) -> Cut:
    """Cut half of each group by L2; the layers before the outputs and the heads are named."""
    import torch_pruning

    network, ignored = case.network, output_layers(case)
    began = time.process_time()
    heads = _heads(network)
    pruner = torch_pruning.pruner.BasePruner(
        network, case.example, torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=HALF, ignored_layers=ignored, num_heads=heads, forward_fn=case.run,
    )  # fmt: skip
    pruner.step()
    _set_head_sizes(network, heads)
    return Cut(network, time.process_time() - began, {})


def by_kirigami(case: Case) -> Cut:
    """Cut half of each of its channel axes by L2."""
    import torch_kirigami
    from torch_kirigami import pruning as kirigami

    network, run = case.network, case.run
    traced = _Layers(network, run).eval() if case.forward else network
    began = time.process_time()
    try:
        graph = torch_kirigami.DependencyGraph.build(traced, args=(case.example,))
        pruner = kirigami.Pruner(traced, graph=graph)
        pruner.prune(
            _analysed(pruner, pruner.discover_candidates()),
            budget=kirigami.ChannelRatio(HALF),
            strategy=kirigami.Greedy(kirigami.GroupMagnitude(p=2)),
        )
    except (torch_kirigami.KirigamiError, kirigami.PlanningError) as error:
        raise RefusedError(str(error)) from error
    return Cut(network, time.process_time() - began, {})


def _analysed(pruner: Any, space: Any) -> Any:
    """The axes whose channels it can follow to the end: with others no budget is ever met."""
    first = {candidate.axis: candidate for candidate in reversed(space.candidates)}
    axes = [a for a in space.channel_axes if a in first and pruner.impact((first[a],)).complete]
    candidates = tuple(c for c in space.candidates if c.axis in set(axes))
    return type(space)(candidates, tuple(axes))


class _Layers(nn.Module):
    """What ``run`` computes of a network, as a module."""

    def __init__(self, network: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self, images: torch.Tensor) -> Any:
        return self.run(self.network, images)


def output_layers(case: Case) -> list[nn.Module]:
    """The last layers before each output, whose own outputs Torch-Pruning is to keep.

    They are found by a walk back from the outputs to the first convolutions and products.
    """
    owners = {p: m for m in case.network.modules() for p in m.parameters(recurse=False)}
    outputs = tensors_in(case.run(case.network, case.example))
    found: list[nn.Module] = []
    nodes, seen = [t.grad_fn for t in outputs if t.grad_fn is not None], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [following for following, _ in node.next_functions if following is not None]
        weights = [w for w in map(_parameter, inputs) if w is not None and w.dim() > 1]
        if weights and type(node).__name__.startswith(LAYERS):
            found += [owners[w] for w in weights if w in owners]
        else:
            nodes += inputs
    return list(dict.fromkeys(found))


def _parameter(node: Any) -> torch.Tensor | None:
    """The parameter that a node of the backward graph, or a view of it, leads to."""
    while type(node).__name__.startswith(VIEWS):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _heads(network: nn.Module) -> dict[nn.Module, int]:
    """Queries, keys and values with their numbers of heads, as its examples name them."""
    heads: dict[nn.Module, int] = {}
    for module in network.modules():
        count = getattr(module, "num_heads", None)
        if not isinstance(count, int) or count < 2:
            continue
        for name in ("qkv", "q", "k", "v", "kv", "query", "key", "value"):
            layer = getattr(module, name, None)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                heads[layer] = count
    return heads


def _set_head_sizes(network: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Set the sizes of the heads that attention keeps, as its examples do after a cut."""
    for module in network.modules():
        layer = getattr(module, "qkv", None)
        if layer in heads:
            module.head_dim = layer.weight.shape[0] // 3 // module.num_heads
            if hasattr(module, "attn_dim"):
                module.attn_dim = module.head_dim * module.num_heads


TOOLS: dict[str, Callable[[Case], Cut]] = {
    "gammaslim": by_gammaslim,
    "torch-pruning": by_torch_pruning,
    "torch-kirigami": by_kirigami,
}
UNPROVEN = GammaslimError
