"""Importance and compensation by name, with the calibration pictures that they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.distributed.collectives import total
from job.errors import UsageError
from job.processes import is_main, world_size
from job.slimming.calibration.moments import collect, readers
from job.slimming.compensation.folding import METHODS, betas, fold_means
from job.slimming.compensation.regression import quiet, regress
from job.slimming.importance.criteria import (
    gamma_importance,
    magnitude_importance,
    random_importance,
)
from job.slimming.importance.refit import refit_importance
from job.slimming.importance.taylor import taylor_importance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from job.slimming.calibration.moments import Batch, Moments
    from job.slimming.compensation.regression import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.graph.union import Ids
    from job.slimming.importance.scores import Scores
    from job.slimming.inputs import Example
    from job.slimming.planning.layer_channels import Layers

    Batches = Callable[[], Iterable[Batch]]  # every call gives them anew, on the network's device

IMPORTANCES = ("gamma", "l2", "random", "taylor", "refit")
COMPENSATIONS = METHODS


def measured(
    importance: str,
    method: str,
    network: nn.Module,
    graph: ChannelGraph,
    batches: Batches | None,
) -> dict[str, Moments]:
    """The moments, by reader, that an importance and a compensation method need; {} for none.

    Raises UsageError when there are no calibration pictures for them.
    """
    asked = [f"--importance {importance}"] if importance == "refit" else []
    asked += [f"--compensate {method}"] if method in ("mean", "regress") else []
    if not asked:
        return {}
    moments: dict[str, Moments] = {}
    if batches is not None and (importance == "refit" or method == "mean"):
        moments = collect(network, graph, batches())
        batches = batches if moments or not readers(network, graph) else None
    if batches is None:
        raise UsageError(f"{' and '.join(asked)}: calibration images are needed, there are none")
    return moments  # regress takes its own


def scores_for(
    importance: str,
    network: nn.Module,
    graph: ChannelGraph,
    moments: Mapping[str, Moments],
    batches: Batches | None = None,
    seed: int = 0,
) -> Scores:
    """The importance (count,) of every channel; ``moments`` are as ``measured`` gave them.

    ``taylor`` needs ``batches`` of pictures with labels: raises UsageError without.
    """
    if importance == "gamma":
        return gamma_importance(network, graph)
    if importance == "l2":
        return magnitude_importance(network, graph)
    if importance == "random":
        return random_importance(graph, seed)
    if importance == "refit":
        return refit_importance(network, graph, moments)
    assert importance == "taylor", importance
    return taylor_importance(network, graph, batches() if batches else ())


def compensated(
    wide: nn.Module,
    narrow: nn.Module,
    graph: ChannelGraph,
    keep: Ids,
    layers: Layers,
    method: str,
    moments: Mapping[str, Moments],
    example: Example,
    batches: Batches | None = None,
    check: Callable[[], None] = lambda: None,
    progress: Progress = quiet,
) -> None:
    """Give ``narrow`` what the channels outside ``keep`` (count,) added in ``wide``, in place.

    After its proof, which is of the plain cut. ``layers`` have gone through ``with_biases``;
    ``example`` is like what the network takes; ``regress`` needs ``batches``. All
    processes get the main one's weights.
    """
    if method == "regress":
        images = batches or tuple
        regress(wide, narrow, graph, keep, layers, images, example, check=check, progress=progress)
    elif method != "none":
        means = betas(wide, graph, keep, example) if method == "beta" else moments
        fold_means(wide, narrow, graph, keep, layers, means, example)
    if world_size() > 1:
        with torch.no_grad():
            for tensor in (*narrow.parameters(), *narrow.buffers()):
                tensor.mul_(is_main())
                total(tensor)
