"""Reconstruction: layers of the narrow network fitted to the outputs of the wide one.

Layers are fitted by least squares, one after the other in the order of the data flow. A fit changes
the kernel and the bias of a layer so that its outputs, from its inputs in the narrow network, are
those of the wide layer. Earlier layers are already fitted, so that errors do not add up (He et al.
2017, section 3.2). A layer whose output is only added to another one, as at the end of a residual
block, is fitted to the sum: it also makes up for the error of the other summand.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.distributed.collectives import total
from job.errors import UsageError
from job.slimming.calibration.patches import row_count
from job.slimming.calibration.progress import no_progress
from job.slimming.compensation.channel_maps import fit_channel_map
from job.slimming.compensation.constant_fit import fit_constant, fit_mean_error
from job.slimming.compensation.kernel_fit import can_fit_kernel, fit_kernel
from job.slimming.compensation.normal_equations import RIDGE
from job.slimming.compensation.paired_passes import PairedPasses
from job.slimming.graph.layers import SUMMING, modules_of
from job.slimming.graph.removed_layers import ConstantOutput, NoOutput

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.calibration.progress import Progress
    from job.slimming.compensation.cut_pair import CutPair
    from job.slimming.compensation.paired_passes import PairedValues


def reconstruct(
    pair: CutPair,
    batches: Iterable[CalibrationBatch],
    *,
    ridge: float = RIDGE,
    progress: Progress = no_progress,
) -> None:
    """Fit every layer of the narrow network that comes after the first cut, in place.

    ``batches`` are those of this process, possibly none. Raises UsageError if no process has
    images, and DataError if the inputs of a layer are not finite.
    """
    layers = _layers_to_fit(pair)
    if not layers:
        return
    progress("reconstructing layers", 0, 0)
    summands = {layer: module for layer in layers if (module := pair.summand(layer))}
    passes, fitted = PairedPasses(pair, batches, layers, summands), False
    with passes.started():
        for number, layer in enumerate(layers, start=1):
            progress("reconstructing layer", number, len(layers))
            values = passes.values(layer)
            if _fit_layer(pair, layer, values, ridge):
                fitted = True
                passes.replace_outputs(layer, values)
    if not fitted:
        raise UsageError("--compensate regress: calibration images are needed, but there are none")


def _layers_to_fit(pair: CutPair) -> list[str]:
    """Return the layers from the first one that loses inputs, in the order of their fits.

    Layers that share their weight with another one are left out, as are those that compute it in
    each pass and cannot hold a constant.
    """
    modules = modules_of(pair.wide)
    layers = (m for m in modules_of(pair.wide, once=True).values() if _is_layer(m))
    uses = Counter(id(layer.weight) for layer in layers)
    names = itertools.dropwhile(
        lambda name: name not in pair.layers or pair.layers[name].in_ is None,
        pair.graph.forward.pause_points,
    )
    return [
        name
        for name in names
        if _is_layer(modules.get(name))
        and uses[id(modules[name].weight)] == 1
        and not isinstance(pair.narrow.get_submodule(name), NoOutput)
        and (name not in pair.graph.computed or pair.holds_constant(name))
    ]


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, SUMMING)


def _fit_layer(pair: CutPair, name: str, values: Sequence[PairedValues], ridge: float) -> bool:
    """Fit a layer to ``values``; returns whether any process has values.

    If the kernel cannot be fitted, a map of its input channels is fitted instead. Where the kernel
    is computed in each pass, only the constant is fitted.
    """
    layer = pair.narrow.get_submodule(name)
    if isinstance(layer, ConstantOutput):
        return fit_constant(pair, name, values)
    if name in pair.graph.computed:
        return fit_mean_error(pair, name, values)
    rows = sum(row_count(layer, batch.outputs) for batch in values)
    count = torch.tensor(
        float(rows), dtype=torch.float64, device=layer.get_parameter("weight").device
    )
    available = int(total(count))
    if not available:
        return False
    if can_fit_kernel(layer, available):
        return fit_kernel(pair, name, values, available, ridge)
    consumer = next((c for c in pair.consumers() if c.layer == name), None)
    return consumer is not None and fit_channel_map(pair, consumer, values, ridge)
