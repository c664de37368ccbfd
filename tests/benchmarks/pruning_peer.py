"""Cuts by Torch-Pruning to a share of a cost, with the best of several settings."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_pruning
from torch import nn
from torch.nn import functional as F

IMPORTANCES: dict[str, Callable[[str | None], torch_pruning.importance.Importance]] = {
    "bnscale": lambda norm: torch_pruning.importance.BNScaleImportance(normalizer=norm),
    "l2": lambda norm: torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=norm),
    "taylor": lambda norm: torch_pruning.importance.GroupTaylorImportance(normalizer=norm),
}
CLOSE = 0.005  # of the limit: no better ratio is searched for
TRIES = 9  # of the ratio, for each setting


@dataclass(frozen=True)
class Setting:
    """How a Torch-Pruning pruner is called.

    ``inner`` leaves channels that several layers write (residual streams) whole. ``ranking`` is
    ``global`` or ``local``, ``normaliser`` makes groups comparable, ``steps`` are those of
    iterative pruning.
    """

    inner: bool
    ranking: str
    normaliser: str | None
    steps: int

    def __str__(self) -> str:
        scope = "inner channels" if self.inner else "all channels"
        norm = f", {self.normaliser}" if self.ranking == "global" else ""
        return f"{scope}, {self.ranking}{norm}, {self.steps} step{'s' * (self.steps > 1)}"


SETTINGS = [
    *(Setting(inner, "local", "mean", 1) for inner in (True, False)),
    *itertools.starmap(
        Setting, itertools.product((True, False), ("global",), ("mean", "max", None), (1, 5))
    ),
]


@dataclass(frozen=True)
class PeerCut:
    """A narrow network, the setting that made it, and the ``seconds`` of that cut alone."""

    network: nn.Module
    setting: Setting
    seconds: float


def measure_gradients(
    network: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """Add up the gradients of the cross entropy, for ``taylor``; return the seconds."""
    began = time.process_time()
    network.zero_grad()
    network.requires_grad_(True)
    for images, labels in batches:
        F.cross_entropy(network(images), labels).backward()
    return time.process_time() - began


def cut_by_peer(
    criterion: str,
    network: nn.Module,
    image: torch.Tensor,
    cost: Callable[[nn.Module], float],
    limit: float,
    score: Callable[[nn.Module], float],
    settings: list[Setting] = SETTINGS,
) -> PeerCut | None:
    """Return the cut with the highest ``score`` whose ``cost`` is at most ``limit``.

    It is None where all settings fail. The score is the accuracy on images outside the calibration
    sample and the test images.
    """
    best, highest = None, float("-inf")
    for setting in settings:
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cut = _cut(criterion, network, image, cost, limit, setting)
            if cut and (value := score(cut.network)) > highest:
                best, highest = cut, value
    return best


def _cut(
    criterion: str,
    network: nn.Module,
    image: torch.Tensor,
    cost: Callable[[nn.Module], float],
    limit: float,
    setting: Setting,
) -> PeerCut | None:
    """The cut with the smallest share of channels that costs at most ``limit``."""
    low, high, best = 0.0, 1.0, None
    for _ in range(TRIES):
        began = time.process_time()
        narrow = _copy(network)
        importance = IMPORTANCES[criterion](setting.normaliser)
        pruner = torch_pruning.pruner.BasePruner(
            narrow, image, importance, pruning_ratio=(low + high) / 2,
            global_pruning=setting.ranking == "global", iterative_steps=setting.steps,
            ignored_layers=_ignored(narrow, image, setting.inner),
        )  # fmt: skip
        for _ in range(setting.steps):
            pruner.step()
        seconds = time.process_time() - began
        left = cost(narrow)
        if left > limit:
            low = (low + high) / 2
            continue
        best, high = PeerCut(narrow, setting, seconds), (low + high) / 2
        if left > (1 - CLOSE) * limit:
            break
    return best


def _copy(network: nn.Module) -> nn.Module:
    """A copy with the gradients, which deepcopy leaves out."""
    copied = copy.deepcopy(network)
    for parameter, original in zip(copied.parameters(), network.parameters(), strict=True):
        parameter.grad = None if original.grad is None else original.grad.clone()
    return copied


def _ignored(network: nn.Module, image: torch.Tensor, inner: bool) -> list[nn.Module]:
    """The classifier, and with ``inner`` the layers of every group that several layers write."""
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    ignored = [last]
    if inner:
        graph = torch_pruning.DependencyGraph().build_dependency(network, image)
        for group in graph.get_all_groups(ignored_layers=ignored):
            writers = [
                dependency.target.module
                for dependency, _ in group
                if dependency.handler in WRITERS
                and getattr(dependency.target.module, "groups", 1) == 1
            ]
            if len(set(writers)) > 1:
                ignored += writers
    return ignored


WRITERS = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_linear_out_channels)
