"""Kernel fit: least squares for the kernel and bias of a narrow layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from job.slimming.calibration.patches import (
    has_patches,
    pad_inputs,
    patches_at,
    row_count,
    sample_positions,
    values_at,
)
from job.slimming.compensation.normal_equations import NormalEquations
from job.slimming.graph.layers import TRANSPOSED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from job.slimming.compensation.cut_pair import CutPair
    from job.slimming.compensation.paired_passes import PairedValues

MAX_COLUMNS = 5000  # of the normal equations; a 3 x 3 kernel of 512 channels has 4608
MIN_ROWS_PER_COLUMN = 4
ENOUGH_ROWS = 100  # for each column, in addition to MIN_ROWS
MIN_ROWS = 4000
MAX_KERNEL_PRODUCTS = 2**36  # for one layer: about two seconds on two cores
MAX_BLOCK_VALUES = 2**22  # in one block of rows
SMALLEST_GAIN = 1e-6  # of a BatchNorm; channels with a smaller gain are not fitted to a sum


def can_fit_kernel(layer: Any, rows: int) -> bool:
    """Return whether the kernel of ``layer`` can be fitted to ``rows`` output positions.

    Its outputs must be its kernel times patches of its inputs, and there must be a few rows for
    each column.
    """
    if isinstance(layer, TRANSPOSED):
        return False
    columns = layer.weight[0].numel()
    enough = columns <= MAX_COLUMNS and rows >= MIN_ROWS_PER_COLUMN * columns
    return enough and has_patches(layer)


def fit_kernel(
    pair: CutPair, name: str, values: Sequence[PairedValues], available: int, ridge: float
) -> bool:
    """Fit the narrow layer ``name`` to the wide outputs in ``values`` of this process.

    ``available`` is the number of rows, i.e. output positions, of all processes, of which an even
    sample is used. The ridge, at least ``ridge``, pulls the kernel to that of the plain cut.
    Returns whether any process has rows.
    """
    layer: Any = pair.narrow.get_submodule(name)
    weight, groups = layer.weight, int(getattr(layer, "groups", 1))
    columns, outputs = weight[0].numel(), len(weight) // groups
    equations = NormalEquations(groups, columns, outputs, weight.device)
    step = -(-available // _enough_rows(groups, columns, outputs))
    earlier = 0  # images of earlier batches
    for batch in values:
        for patches, errors, images in _rows(pair, name, batch, step):
            equations.add(patches, errors.reshape(-1, groups, outputs), images + earlier)
        earlier += sum(batch.sizes)
    solution = equations.solve(name, ridge, constant=pair.holds_constant(name))
    if solution is None:
        return False
    slopes, constants = solution
    with torch.no_grad():
        by_element = slopes.view(groups, weight[0, 0].numel(), -1, outputs)
        change = by_element.permute(0, 3, 2, 1).reshape(weight.shape)
        weight.copy_(weight.cpu().double() + change)
        pair.add_constant(name, constants.flatten())
    return True


def _enough_rows(groups: int, columns: int, outputs: int) -> int:
    products = groups * columns * (columns + outputs)
    cheap = max(MIN_ROWS_PER_COLUMN * columns, MAX_KERNEL_PRODUCTS // products)
    return min(MIN_ROWS + ENOUGH_ROWS * columns, cheap)


def _rows(
    pair: CutPair, name: str, batch: PairedValues, step: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield patches (N, G, K · C) of narrow inputs, errors (N, O) of outputs, and images (N,).

    They come in blocks. The C inputs of a group are side by side for each element of the kernel.
    Images are indices into the batch.
    """
    layer: Any = pair.narrow.get_submodule(name)
    kept_rows = pair.kept_rows(name).to(batch.outputs.device)
    scales, padded = pair.row_scales(name), pad_inputs(layer, batch.inputs)
    sizes = batch.outputs.shape[2:]
    rows = row_count(layer, batch.outputs)
    where = sample_positions(rows, step, batch.sizes, padded.device)
    groups = int(getattr(layer, "groups", 1))
    inputs, elements = layer.weight.shape[1], layer.weight[0, 0].numel()
    block = max(1, MAX_BLOCK_VALUES // (padded.shape[1] * elements))
    kernels = _by_element(layer.weight.reshape(groups, -1, inputs, elements))
    for part in torch.split(where, block):
        patches = _at_least_float32(patches_at(layer, padded, part, sizes))
        patches = _by_element(patches.view(-1, groups, inputs, elements))
        wanted = _at_least_float32(values_at(layer, batch.outputs, part)[:, kept_rows])
        wanted = wanted * scales.to(wanted)
        if batch.narrow_sum is not None:
            errors = wanted - values_at(layer, batch.narrow_sum, part)
            errors = errors * inverse_gain(pair, name).to(errors)
        else:
            products = patches.transpose(0, 1) @ kernels.to(patches.dtype).transpose(1, 2)
            outputs = products.transpose(0, 1).flatten(1)
            errors = wanted - (outputs if layer.bias is None else outputs + layer.bias)
        yield patches, errors, part * sum(batch.sizes) // rows


def _by_element(values: torch.Tensor) -> torch.Tensor:
    """Return kernels or patches (…, C, K) as (…, K · C)."""
    return values.transpose(-1, -2).flatten(-2)


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def inverse_gain(pair: CutPair, name: str) -> torch.Tensor:
    """Return the change (O,) of the outputs of a layer that changes the sum by 1."""
    module: Any = pair.narrow.get_submodule(pair.summand(name) or name)
    if module is pair.narrow.get_submodule(name):
        return torch.ones(1)
    gain = (module.running_var.double() + module.eps).rsqrt()
    gain = gain if module.weight is None else gain * module.weight
    return torch.where(gain.abs() > SMALLEST_GAIN, 1 / gain, 0)
