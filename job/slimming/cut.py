"""One cut, from measuring to what makes up for it: of the job, of ``job.slim``, of ``slim``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from job.console import warn
from job.distributed.collectives import check_same, digest, on_main
from job.processes import is_main, world_size
from job.slimming.calibrated import compensated, measured, scores_for
from job.slimming.compensation.folding import with_biases, without_constant
from job.slimming.compensation.regression import quiet
from job.slimming.planning.allocation import make_plan
from job.slimming.planning.plan import keep_of
from job.slimming.surgery.comparison import check_finite_weights
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from job.slimming.calibrated import Batches
    from job.slimming.compensation.regression import Progress
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.importance.scores import Scores
    from job.slimming.inputs import Example
    from job.slimming.planning.allocation import Allocation
    from job.slimming.planning.base import Base
    from job.slimming.planning.plan import Plan


@dataclass(frozen=True)
class Method:
    """What decides which channels go, and what makes up for them."""

    importance: str = "gamma"
    compensate: str = "none"
    seed: int = 0

    def __str__(self) -> str:
        return f"importance {self.importance}, compensation {self.compensate}"


def best_method(
    importance: str | None, compensate: str | None, *, images: bool, seed: int = 0
) -> tuple[Method, str]:
    """The method, None being the best with or without calibration ``images``; a line says which.

    The line is empty when both are given. Refit counts on regress: gamma is better without it.
    """
    found = compensate or ("regress" if images else "none")
    ranking = importance or ("refit" if images and found == "regress" else "gamma")
    method = Method(ranking, found, seed)
    if importance and compensate:
        return method, ""
    why = "by the calibration images" if images else "there are no calibration images"
    return method, f"{method}: {why}"


def plan_cut(
    network: nn.Module,
    graph: ChannelGraph,
    scores: Scores,
    allocation: Allocation,
    compensate: str,
    example: Example,
    base: Base | None = None,
) -> Plan:
    """Which channels stay, by ``scores`` (count,), and which layers get a bias to compensate.

    ``example`` is like what the network takes; ``base`` is what fractions are of, the
    network itself by default. Raises UsageError for what cannot be reached.
    """
    bare: frozenset[str] = frozenset()
    if compensate != "none":
        bare = without_constant(network, graph, example)
    plan = make_plan(network, graph, scores, allocation, base, bare)
    return replace(plan, layers=with_biases(plan.layers, bare))


def make_cut(
    network: nn.Module,
    graph: ChannelGraph,
    example: Example,
    method: Method,
    plan_of: Callable[[Scores], Plan],
    batches: Batches | None = None,
    check: Callable[[], None] = lambda: None,
    progress: Progress = quiet,
) -> tuple[nn.Module, Plan, float]:
    """The narrow network, compensated, the plan that ``plan_of`` made, and the proof's error.

    Moments are of all processes; the main one decides and proves; all cut, and compare what they
    have. ``batches`` gives the calibration images of this process; ``check`` is called now and
    then, and may raise; ``progress`` gets what is done next. Raises UsageError where images are
    needed and missing, DataError for weights that are not finite, and GammaslimError when the
    proof fails.
    """
    check_finite_weights(network)
    progress("measuring channels", 0, 0)
    moments = measured(method.importance, method.compensate, network, graph, batches)
    scores = scores_for(method.importance, network, graph, moments, batches, method.seed)
    plan = on_main(lambda: plan_of(scores))
    plan, layers = replace(plan, method=str(method)), plan.layers
    progress("proving the cut", 0, 0)
    narrow = apply_plan(network, layers)
    if world_size() > 1:
        check_same(digest(narrow.state_dict()), "the slimmed network")
    proof = on_main(
        lambda: verify(network, narrow, layers, example, auxiliary=graph.auxiliary, odd=graph.odd),
        interrupt=True,
    )
    if proof.precision != "float64" and is_main():
        warn(f"the network does not run in float64: the cut is exact to {proof}")
    keep = keep_of(graph, plan.groups)
    shared = (method.compensate, moments, example, batches, check, progress)
    compensated(network, narrow, graph, keep, layers, *shared)
    return narrow, replace(plan, proof=proof), proof.error
