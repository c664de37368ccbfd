"""Calibration batches of the user: tensors, pairs with labels, several inputs, or dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from job.errors import UsageError, reason
from job.slimming.calibration.batch import image_limit
from job.slimming.graph.trace import trace_network
from job.slimming.inputs import (
    arguments_for,
    batch_signature,
    fields_of,
    kind_of,
    move_like,
    sample_count,
    tensors_in,
)

if TYPE_CHECKING:
    from torch import nn

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.inputs import Example

LABEL_KEYS = ("labels", "label", "targets", "target", "y", "class", "classes")
FORMS = "calibration is an iterable of batches, e.g. [images] or a DataLoader"


def read_batches(
    model: nn.Module,
    example: Example,
    calibration: Any,
    least: int = 0,
    most: int | None = None,
) -> list[CalibrationBatch]:
    """Return the first batches of ``calibration``, on the network's device and in its dtype.

    Reading stops after the batch that completes ``least`` batches and ``most`` images, by default
    the number that ``image_limit`` returns. A batch has the form of the ``example``, or is a pair
    of such inputs and labels (B,). Of a dict, only the keys of the example are used. Raises
    UsageError for anything else, or if there is no sample; batches without any are left out.
    """
    if isinstance(calibration, (torch.Tensor, str, Mapping)) or not isinstance(
        calibration, Iterable
    ):
        raise UsageError(f"{FORMS}; got {kind_of(calibration)}")
    if most is None:
        most = image_limit(min(next(tensors_in(example)).shape[2:], default=0))
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    batches: list[CalibrationBatch] = []
    count, seen = 0, {batch_signature(example)}  # the network was traced on the example
    for number, batch in enumerate(calibration):
        where = f"calibration: batch {number}"
        inputs, labels = _split(model, example, batch, where)
        _check_types(example, inputs, where)
        if not sample_count(inputs):
            continue
        inputs = inputs if weight is None else move_like(inputs, weight)
        _check_runs(model, inputs, where, seen)
        device = next(tensors_in(inputs)).device
        batches.append((inputs, labels if labels is None else labels.to(device)))
        count += sample_count(inputs)
        if count >= most and len(batches) >= least:
            break
    if not batches:
        raise UsageError(f"{FORMS}; it is empty")
    return batches


def _split(
    model: nn.Module, example: Example, batch: Any, where: str
) -> tuple[Example, torch.Tensor | None]:
    """Split a batch into inputs of the network and labels; None without labels."""
    if not isinstance(batch, (torch.Tensor, tuple, list, Mapping)) and not _matches(example, batch):
        raise UsageError(f"{where} is a {type(batch).__name__}: {FORMS}")
    if _matches(example, batch):
        return arguments_for(model, _in_form_of(example, batch)), _labels_in(batch)
    if isinstance(batch, Mapping):
        images = [v for v in batch.values() if _matches(example, v)]
        if len(images) == 1:
            return images[0], _labels_in(batch)
        raise UsageError(
            f"{where} is a dict of {', '.join(map(str, batch))}, of which {len(images)} entries "
            "are like the example: give pairs of inputs and labels, or an example that is a dict"
        )
    if isinstance(batch, (tuple, list)) and batch:
        *rest, last = batch
        if len(batch) == 1 and _matches(example, last):
            return _split(model, example, last, where)
        if len(batch) > 1 and _matches(example, batch[0]):  # entries after the labels are ignored
            inputs, labels = _split(model, example, batch[0], where)
            return inputs, _labels(batch[1]) if labels is None else labels
        if _matches(example, tuple(rest)):
            return tuple(rest), _labels(last)
    raise UsageError(
        f"{where} is {_shapes_text(batch)}, the example {_shapes_text(example)}: {FORMS}"
    )


def _in_form_of(example: Example, batch: Any) -> Any:
    if isinstance(example, dict) and isinstance(batch, Mapping):
        return {key: batch[key] for key in example}
    if isinstance(example, tuple):
        return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    return batch


def _matches(example: Any, batch: Any) -> bool:
    """Return whether a batch, or a part of it, has the form of the example."""
    if isinstance(example, torch.Tensor):
        return (
            isinstance(batch, torch.Tensor)
            and batch.dim() == example.dim()
            and (example.dim() < 4 or batch.shape[1] == example.shape[1])
        )
    if isinstance(example, Mapping):
        return isinstance(batch, Mapping) and all(
            key in batch and _matches(part, batch[key]) for key, part in example.items()
        )
    if isinstance(example, (tuple, list)):
        if not isinstance(batch, (tuple, list)):
            return len(example) == 1 and _matches(example[0], batch)
        if isinstance(example, list) and isinstance(batch, list):
            return bool(batch) and all(_matches(example[0], part) for part in batch)
        return len(example) == len(batch) and all(map(_matches, example, batch))
    if fields_of(example):  # an object: its tensors are compared
        wanted, given = list(tensors_in(example)), list(tensors_in(batch))
        alike = isinstance(batch, type(example)) and len(wanted) == len(given)
        return alike and all(map(_matches, wanted, given))
    return not isinstance(batch, torch.Tensor)  # a number or None, which may differ between batches


def _labels_in(batch: Any) -> torch.Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    return next((_labels(batch[name]) for name in LABEL_KEYS if name in batch), None)


def _labels(value: Any) -> torch.Tensor | None:
    """Return class indices (B,) int64; None for any other kind of labels."""
    if not isinstance(value, torch.Tensor) or value.dim() != 1:
        return None
    return None if value.is_floating_point() or value.is_complex() else value.long()


def _check_types(example: Example, inputs: Example, where: str) -> None:
    for wanted, tensor in zip(tensors_in(example), tensors_in(inputs), strict=False):
        if wanted.is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(
                f"{where} is {kind}, the network takes floating-point numbers: preprocess it as "
                "in evaluation, e.g. batch.float() / 255, then normalise"
            )
        if tensor.is_floating_point() and not wanted.is_floating_point():
            kind = str(wanted.dtype).removeprefix("torch.")
            raise UsageError(f"{where} has floating-point numbers, the example {kind}")


def _check_runs(model: nn.Module, inputs: Example, where: str, seen: set[object]) -> None:
    """Raise UsageError unless the network runs on inputs of a shape that is not in ``seen``."""
    if (shape := batch_signature(inputs)) in seen:
        return
    seen.add(shape)
    try:
        trace_network(model, inputs)
    except Exception as error:  # user code may raise anything
        raise UsageError(
            f"{where}, {_shapes_text(inputs)}: the network does not run: {reason(error)}"
        ) from error


def _shapes_text(batch: Any) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(batch)]
    return " and ".join(shapes[:4]) or f"a {type(batch).__name__} without tensors"
