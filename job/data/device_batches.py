"""Batches on their device: the next one is copied and rotated while one is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from job.data.rotation import rotate_batch
from job.data.task_items import ItemBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from job.data.batches import Batch, TrainingBatch


def move_batches(
    batches: Iterable[TrainingBatch | ItemBatch], device: torch.device, *, ahead: bool | None = None
) -> Iterator[Batch | ItemBatch]:
    """Yield the images (B, H, W, 3) uint8 and labels (B,) of ``batches`` on ``device``.

    The items of a task are moved as they are.

    On a GPU, the copy of the next batch is queued on a separate stream before a batch is yielded.
    Only the kernels that read a batch wait for its copy. ``ahead`` does the same on other devices.
    """
    if not (device.type == "cuda" if ahead is None else ahead):
        for batch in batches:
            yield _move(batch, device)
        return
    backend: Any = torch.get_device_module(device)
    copies = backend.Stream()
    waiting: Batch | ItemBatch | None = None
    for batch in batches:
        ready = None if waiting is None else _received(waiting, backend, copies)
        with backend.stream(copies):
            waiting = _move(batch, device)
        if ready is not None:
            yield ready
    if waiting is not None:
        yield _received(waiting, backend, copies)


def _move(batch: TrainingBatch | ItemBatch, device: torch.device) -> Batch | ItemBatch:
    if isinstance(batch, ItemBatch):
        return batch.to(device)
    images, labels, *rotation = (part.to(device, non_blocking=True) for part in batch)
    return (rotate_batch(images, *rotation) if rotation else images), labels


def _received(batch: Batch | ItemBatch, backend: Any, copies: Any) -> Batch | ItemBatch:
    """Make the kernels that follow wait for the copies; return ``batch``."""
    current = backend.current_stream()
    current.wait_stream(copies)
    for part in batch.tensors() if isinstance(batch, ItemBatch) else batch:
        if part.is_cuda:  # otherwise a later batch could reuse its memory while a kernel reads it
            part.record_stream(current)
    return batch
