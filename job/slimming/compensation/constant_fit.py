"""Constant fit: the constant of a layer is fitted to the mean outputs of the wide layer.

Layers without inputs have nothing else, and weights that are computed in each pass stay as cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from job.distributed.collectives import total
from job.errors import DataError
from job.slimming.compensation.kernel_fit import inverse_gain
from job.slimming.graph.removed_layers import ConstantOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.slimming.compensation.cut_pair import CutPair
    from job.slimming.compensation.paired_passes import PairedValues


def fit_constant(pair: CutPair, name: str, values: Sequence[PairedValues]) -> bool:
    """Fit the constant of the narrow layer ``name`` to the wide outputs, or to a sum with them.

    ``values`` are those of this process. Returns whether any process has values. Raises DataError
    if the wide outputs are not finite.
    """
    layer = pair.narrow.get_submodule(name)
    assert isinstance(layer, ConstantOutput)
    kept = pair.kept_rows(name)
    bias = getattr(pair.wide.get_submodule(name), "bias", None)
    plain = torch.zeros(len(kept)).double() if bias is None else bias.detach().cpu().double()[kept]
    axis = -1 if layer.geometry is None else 1
    sums = torch.zeros(len(kept) + 1, dtype=torch.float64, device=layer.bias.device)
    for batch in values:
        wanted = batch.outputs.index_select(axis, kept.to(batch.outputs.device)).double()
        plain_outputs = plain.to(wanted.device)
        if batch.narrow_sum is not None:
            wanted, plain_outputs = (
                wanted - batch.narrow_sum.double(),
                torch.zeros_like(plain_outputs),
            )
        rows = wanted.movedim(axis, -1).reshape(-1, len(kept)) - plain_outputs
        sums[:-1] += rows.sum(0)
        sums[-1] += len(rows)
    return _add_mean(pair, name, sums)


def fit_mean_error(pair: CutPair, name: str, values: Sequence[PairedValues]) -> bool:
    """Add the mean error of the outputs of the narrow layer ``name`` to its constant.

    ``values`` are those of this process. Returns whether any process has values. Raises DataError
    if the outputs are not finite.
    """
    layer: Any = pair.narrow.get_submodule(name)
    kept = pair.kept_rows(name)
    sums = torch.zeros(len(kept) + 1, dtype=torch.float64, device=layer.weight.device)
    for batch in values:
        with torch.no_grad():
            summed = batch.narrow_sum
            narrow = layer.forward(batch.inputs) if summed is None else summed
        errors = batch.outputs.index_select(1, kept.to(batch.outputs.device)).double() - narrow
        rows = errors.movedim(1, -1).reshape(-1, len(kept))
        rows = rows if summed is None else rows * inverse_gain(pair, name).to(rows)
        sums[:-1] += rows.sum(0)
        sums[-1] += len(rows)
    return _add_mean(pair, name, sums)


def _add_mean(pair: CutPair, name: str, sums: torch.Tensor) -> bool:
    """Add the mean from sums of all rows (O,) and their count; returns whether there are rows."""
    sums = total(sums).cpu()
    if not bool(sums.isfinite().all()):
        raise DataError(f"the outputs of {name} on the calibration images are not finite")
    if sums[-1]:
        with torch.no_grad():
            pair.add_constant(name, sums[:-1] / sums[-1])
    return bool(sums[-1])
