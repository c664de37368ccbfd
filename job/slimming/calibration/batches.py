"""Calibration batches as users have them: tensors, pairs with labels, several inputs, dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from job.errors import UsageError, reason
from job.slimming.calibration.moments import samples_at
from job.slimming.graph.trace import trace_network
from job.slimming.inputs import (
    arguments_for,
    batch_signature,
    kind_of,
    move_like,
    sample_count,
    tensors_of_inputs,
)

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.calibration.moments import Batch
    from job.slimming.inputs import Example

LABELS = ("labels", "label", "targets", "target", "y", "class", "classes")
FORMS = "calibration is an iterable of batches, e.g. [images] or a DataLoader"


def batches_of(model: nn.Module, example: Example, calibration: Any, least: int = 0) -> list[Batch]:
    """The first ``batches`` of a user's, on the network's device and in its type.

    As many as have the samples that are measured, and ``least`` in any case. Each is what the
    network takes, as the ``example`` is, or a pair of that and labels (B,); of a dict the example's
    keys count. Raises UsageError for anything else.
    """
    if isinstance(calibration, (torch.Tensor, str, Mapping)) or not isinstance(
        calibration, Iterable
    ):
        raise UsageError(f"{FORMS}; got {kind_of(calibration)}")
    most = samples_at(min(next(tensors_of_inputs(example)).shape[2:], default=0))
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    batches: list[Batch] = []
    count, seen = 0, set[object]()
    for number, batch in enumerate(calibration):
        where = f"calibration: batch {number}"
        inputs, labels = _split(model, example, batch, where)
        _check_types(example, inputs, where)
        inputs = inputs if weight is None else move_like(inputs, weight)
        _check_runs(model, inputs, where, seen)
        device = next(tensors_of_inputs(inputs)).device
        batches.append((inputs, labels if labels is None else labels.to(device)))
        count += sample_count(inputs)
        if count >= most and len(batches) >= least:
            break
    if not batches:
        raise UsageError(f"{FORMS}; it holds none")
    return batches


def _split(
    model: nn.Module, example: Example, batch: Any, where: str
) -> tuple[Example, torch.Tensor | None]:
    """What the network takes of a batch, and its labels, if it has some."""
    if not isinstance(batch, (torch.Tensor, tuple, list, Mapping)):
        raise UsageError(f"{where} is a {type(batch).__name__}: {FORMS}")
    if _fits(example, batch):
        return arguments_for(model, _like_form(example, batch)), _labels_in(batch)
    if isinstance(batch, Mapping):
        images = [v for v in batch.values() if _fits(example, v)]
        if len(images) == 1:
            return images[0], _labels_in(batch)
        raise UsageError(
            f"{where} is a dict of {', '.join(map(str, batch))}, in which {len(images)} entries "
            "are like the example: give pairs of inputs and labels, or an example that is a dict"
        )
    if isinstance(batch, (tuple, list)) and batch:
        *rest, last = batch
        if len(batch) == 1 and _fits(example, last):
            return _split(model, example, last, where)
        if len(batch) > 1 and _fits(example, batch[0]):  # what follows labels is left out
            inputs, own = _split(model, example, batch[0], where)
            return inputs, _labels(batch[1]) if own is None else own
        if _fits(example, tuple(rest)):
            return tuple(rest), _labels(last)
    raise UsageError(f"{where} is {_shapes(batch)}, the example {_shapes(example)}: {FORMS}")


def _like_form(example: Example, batch: Any) -> Any:
    if isinstance(example, dict) and isinstance(batch, Mapping):
        return {key: batch[key] for key in example}
    return tuple(batch) if isinstance(example, tuple) else batch


def _fits(example: Any, batch: Any) -> bool:
    """Whether a batch, or a part of it, is of the form of the example."""
    if isinstance(example, torch.Tensor):
        return (
            isinstance(batch, torch.Tensor)
            and batch.dim() == example.dim()
            and (example.dim() < 4 or batch.shape[1] == example.shape[1])
        )
    if isinstance(example, Mapping):
        return isinstance(batch, Mapping) and all(
            key in batch and _fits(part, batch[key]) for key, part in example.items()
        )
    if isinstance(example, (tuple, list)):
        if not isinstance(batch, (tuple, list)):
            return len(example) == 1 and _fits(example[0], batch)
        if isinstance(example, list) and isinstance(batch, list):
            return bool(batch) and all(_fits(example[0], part) for part in batch)
        return len(example) == len(batch) and all(map(_fits, example, batch))
    return not isinstance(batch, torch.Tensor)  # a number, None: the batch has its own


def _labels_in(batch: Any) -> torch.Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    return next((_labels(batch[name]) for name in LABELS if name in batch), None)


def _labels(value: Any) -> torch.Tensor | None:
    """Class indices (B,) int64; None for labels of another kind."""
    if not isinstance(value, torch.Tensor) or value.dim() != 1:
        return None
    return None if value.is_floating_point() or value.is_complex() else value.long()


def _check_types(example: Example, inputs: Example, where: str) -> None:
    for wanted, tensor in zip(tensors_of_inputs(example), tensors_of_inputs(inputs), strict=False):
        if wanted.is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(
                f"{where} is {kind}, the network takes floating-point numbers: make them as for "
                "the network itself, e.g. batch.float() / 255, then its mean and std"
            )
        if tensor.is_floating_point() and not wanted.is_floating_point():
            kind = str(wanted.dtype).removeprefix("torch.")
            raise UsageError(f"{where} is of floating-point numbers, the example of {kind}")


def _check_runs(model: nn.Module, inputs: Example, where: str, seen: set[object]) -> None:
    """Raise UsageError unless the network takes inputs of a shape that was not seen before."""
    if (shape := batch_signature(inputs)) in seen:
        return
    seen.add(shape)
    try:
        trace_network(model, inputs)
    except Exception as error:  # anybody's network
        raise UsageError(
            f"{where}, {_shapes(inputs)}: the network does not run on it: {reason(error)}"
        ) from error


def _shapes(batch: Any) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_of_inputs(batch)]
    return " and ".join(shapes[:4]) or f"a {type(batch).__name__} without tensors"
