"""Constant fit: the constant of a layer without inputs is the mean output of the wide layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from job.distributed.collectives import total
from job.errors import DataError
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
    sums = total(sums).cpu()
    if not bool(sums.isfinite().all()):
        raise DataError(f"the outputs of {name} on the calibration images are not finite")
    if sums[-1]:
        with torch.no_grad():
            pair.add_constant(name, sums[:-1] / sums[-1])
    return bool(sums[-1])
