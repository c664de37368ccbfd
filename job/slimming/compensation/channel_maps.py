"""Channel maps: linear maps from the narrow inputs of a layer to its wide ones.

The map is the same for all positions. It has fewer elements than a kernel, so that few positions
are enough to fit it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.slimming.calibration.consumers import input_values, sample_rows
from job.slimming.compensation.normal_equations import NormalEquations

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from job.slimming.calibration.consumers import Consumer
    from job.slimming.compensation.cut_pair import CutPair
    from job.slimming.compensation.paired_passes import PairedValues


def fit_channel_map(
    pair: CutPair, consumer: Consumer, values: Iterable[PairedValues], ridge: float
) -> bool:
    """Fit wide inputs as M · x + b of narrow inputs x, and fold the map into a narrow consumer.

    ``values`` are those of this process. The ridge, at least ``ridge``, pulls M to the plain cut,
    which copies kept channels and sets others to zero. At padded borders the fold is approximate,
    since it adds b to the padding as well. Returns whether any process has inputs.
    """
    parts = list(pair.kept_columns(consumer))
    kept = [int(stays.sum()) for _, stays in parts]
    device = pair.wide.get_submodule(consumer.layer).get_parameter("weight").device
    equations = [
        NormalEquations(1, columns, len(stays), device)
        for columns, (_, stays) in zip(kept, parts, strict=True)
    ]
    for narrow, wide, images in _rows(pair, consumer, values, sum(kept)):
        inputs = torch.split(narrow, kept, 1)
        for sums, (part, stays), columns in zip(equations, parts, inputs, strict=True):
            errors = wide[:, part] - columns @ _copies(stays).to(wide).T
            sums.add(columns[:, None], errors[:, None], images)
    fits = []
    for sums, (_, stays) in zip(equations, parts, strict=True):
        solution = sums.solve(consumer.layer, ridge, constant=True)
        if solution is None:
            return False
        (change,), (constant,) = solution
        fits.append((_copies(stays) + change.T, constant))
    pair.apply_fits(consumer, fits)
    return True


def _rows(
    pair: CutPair, consumer: Consumer, values: Iterable[PairedValues], kept: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield rows of narrow inputs (N, K), wide inputs (N, C), and their images (N,), float64."""
    layer = pair.wide.get_submodule(consumer.layer)
    width, earlier = kept + len(consumer.channels), 0
    for batch in values:
        of_both = [input_values(layer, v, consumer) for v in (batch.inputs, batch.wide_inputs)]
        (narrow, places), (wide, _) = (sample_rows(v.double(), width) for v in of_both)
        size = sum(batch.sizes)
        yield narrow, wide, earlier + places * size // max(1, len(of_both[0]))
        earlier += size


def _copies(stays: torch.Tensor) -> torch.Tensor:
    """Return the matrix (C, K) that copies K inputs to the C channels of the mask ``stays``."""
    return torch.eye(len(stays), dtype=torch.float64)[:, stays]
