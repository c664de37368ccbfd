"""Compensation methods, which make up for removed channels after a cut.

``COMPENSATIONS`` is the table of methods, by the names of ``--compensate``,
which ``config.CompensationName`` lists too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from job.distributed.collectives import total
from job.processes import rank, world_size
from job.slimming.calibration.progress import no_progress
from job.slimming.compensation.folding import beta_statistics, fold_means
from job.slimming.compensation.reconstruction import reconstruct

if TYPE_CHECKING:
    from collections.abc import Callable

    from job.slimming.calibration.input_statistics import CalibrationData
    from job.slimming.calibration.progress import Progress
    from job.slimming.compensation.cut_pair import CutPair


@dataclass(frozen=True)
class Compensation:
    """Compensation method: an entry of the table ``COMPENSATIONS``.

    ``apply`` changes the narrow network in place; it is None for a plain cut. The flags tell what
    it needs: calibration ``images``, and the ``statistics`` of layer inputs over them.
    """

    apply: Callable[[CutPair, CalibrationData, Progress], None] | None
    help: str
    images: bool = False
    statistics: bool = False


COMPENSATIONS: dict[str, Compensation] = {
    "none": Compensation(None, "nothing: a plain cut"),
    "beta": Compensation(
        lambda pair, _calibration, _progress: fold_means(pair, beta_statistics(pair)),
        "the next layers add act(β) of the removed channels",
    ),
    "mean": Compensation(
        lambda pair, calibration, _progress: fold_means(pair, calibration.statistics),
        "the next layers add the mean of the removed channels over the calibration images",
        images=True,
        statistics=True,
    ),
    "regress": Compensation(
        lambda pair, calibration, progress: reconstruct(
            pair, calibration.images(), progress=progress
        ),
        "the layers after the cut are fitted to their outputs before it, by least squares",
        images=True,
    ),
}


def data_of_compensation(name: str, calibration: CalibrationData) -> CalibrationData:
    """Return what the compensation ``name`` needs of the calibration data.

    Statistics are C x C numbers per layer, more than the weights of a large network.
    """
    return calibration if COMPENSATIONS[name].statistics else replace(calibration, statistics={})


def compensate_cut(
    compensate: str,
    pair: CutPair,
    calibration: CalibrationData,
    progress: Progress = no_progress,
) -> None:
    """Apply the compensation named ``compensate`` to the narrow network, in place.

    All processes end with the weights of the main process. Raises UsageError if images are needed
    and no process has any.
    """
    apply = COMPENSATIONS[compensate].apply
    if apply:
        apply(pair, calibration, progress)
    if world_size() > 1:
        with torch.no_grad():
            for tensor in (*pair.narrow.parameters(), *pair.narrow.buffers()):
                tensor.mul_(rank() == 0)
                total(tensor)
