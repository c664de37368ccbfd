"""Items of a user's task: read by number and seed, stacked to batches, divided among processes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from job.data.batches import FAILURES, AugmentedImages, PlainImages
from job.data.sample_order import Draw
from job.data.splits import UNLABELLED, Labels
from job.errors import DataError, item_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL import Image

    from job.data.batches import Failure
    from job.data.preprocessing import Preprocessing
    from job.data.splits import Split


SHOWN = 5  # numbers of items in a message


@dataclass(frozen=True)
class ItemSplit:
    """The items of a task as a split: pairs of inputs and targets, without labels or images.

    ``items`` has a length and either ``sample(index, seed)`` or ``__getitem__(index)``. ``collate``
    makes a batch of a list of pairs. ``numbers`` selects items; None for all. ``identity`` takes
    part in the digest.
    """

    items: Any
    collate: Callable[[list[Any]], Any]
    identity: str = ""
    numbers: Labels | None = None
    lenient: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.items) if self.numbers is None else len(self.numbers)

    @property
    def labels(self) -> Labels:
        """Labels (N,) int64, all -1: targets are not classes."""
        return np.full(len(self), UNLABELLED, np.int64)

    def read(self, index: int, seed: int) -> Any:
        """Return the pair of inputs and targets of an item; ``seed`` decides on its augmentation.

        Without a method ``sample``, the global generators of Python, NumPy and torch are seeded
        while the item is read, and restored.
        """
        number = index if self.numbers is None else int(self.numbers[index])
        if hasattr(self.items, "sample"):
            return self.items.sample(number, seed)
        with _seeded(seed):
            return self.items[number]

    def describe(self, indices: Sequence[int]) -> str:
        """Return the task and the numbers of items in its data set, for a message."""
        numbers = [i if self.numbers is None else int(self.numbers[i]) for i in indices]
        words = ", ".join(map(str, numbers[:SHOWN])) + ", …" * (len(numbers) > SHOWN)
        task = self.identity.partition("\0")[0]
        return f"--task {task}: " * bool(task) + f"item{'s' * (len(numbers) > 1)} {words}"

    def image(self, index: int) -> Image.Image:
        """Raise DataError: items are not images."""
        raise DataError(f"item {index} of a task is not an image")

    def name(self, index: int) -> str:  # noqa: D102
        return str(index)

    def select(self, indices: Labels, _labels: Labels | None = None) -> ItemSplit:  # noqa: D102
        numbers = indices if self.numbers is None else self.numbers[indices]
        return replace(self, numbers=numbers)

    def digest(self) -> bytes:
        """Return the SHA-256 of the number of items and the identity; items are not read."""
        return hashlib.sha256(f"{len(self)}\0{self.identity}".encode()).digest()


class ItemBatch(NamedTuple):
    """Inputs and targets of a batch: tensors in nested tuples, lists and dicts."""

    inputs: Any
    targets: Any

    def to(self, device: torch.device) -> ItemBatch:
        """Return the batch on the device."""
        return ItemBatch(_moved(self.inputs, device), _moved(self.targets, device))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors."""
        return _tensors(tuple(self))


@dataclass(frozen=True)
class TaskItems:
    """The items of a split, indexed by rows of the epoch table in training, else by number."""

    split: ItemSplit

    def __getitems__(self, rows: list[Draw] | list[int]) -> Any | Failure:
        """Return a batch, possibly of no items; a DataError or StorageError is returned."""
        try:
            return self.batch(rows)
        except FAILURES as error:  # raised in a loader process it would show its traceback
            return error
        except Exception as error:  # user code may raise anything
            numbers = [_number_and_seed(row)[0] for row in rows or [0]]
            return item_error(self.split.describe(numbers), error)

    def batch(self, rows: list[Draw] | list[int]) -> ItemBatch:
        """Return a batch, possibly of no items; raises what the data set and ``collate`` raise."""
        items = [self._read(*_number_and_seed(row)) for row in rows or [0]]
        inputs, targets = self.split.collate(items)
        batch = ItemBatch(inputs, targets)
        return batch if rows else ItemBatch(*take_samples(tuple(batch), 0, 0))

    def _read(self, index: int, seed: int) -> Any:
        try:
            return self.split.read(index, seed)
        except OSError as error:
            raise item_error(self.split.describe([index]), error) from error


def training_items(
    split: Split, preprocessing: Preprocessing, *, rotate_later: bool
) -> AugmentedImages | TaskItems:
    """Return the samples of a split as training reads them: augmented, by rows of the table."""
    if isinstance(split, ItemSplit):
        return TaskItems(split)
    return AugmentedImages(split, preprocessing, rotate_later)


def plain_items(split: Split, preprocessing: Preprocessing) -> PlainImages | TaskItems:
    """Return the samples of a split by number, as calibration reads them."""
    return TaskItems(split) if isinstance(split, ItemSplit) else PlainImages(split, preprocessing)


def seed_of(draw: Draw) -> int:
    """Return the seed of an item in an epoch: 53 random bits of its row."""
    return int(draw.top * 2**53)


def stack_items(items: list[Any]) -> Any:
    """Stack items to a batch, the default of a task's ``collate``.

    Tensors, arrays and numbers are stacked to tensors along a new first axis; tuples and dicts are
    stacked part by part; anything else, e.g. texts, becomes a list. Raises ValueError for tensors
    of several shapes.
    """
    first = items[0]
    if isinstance(first, np.ndarray):
        items = [torch.from_numpy(np.ascontiguousarray(item)) for item in items]
    if isinstance(items[0], torch.Tensor):
        if len({item.shape for item in items}) > 1:
            shapes = sorted({tuple(item.shape) for item in items})
            raise ValueError(f"items of several shapes, {shapes[0]} and {shapes[1]}: add collate()")
        return torch.stack(items)
    if isinstance(first, bool | int | float | np.number | np.bool_):
        return torch.as_tensor(np.array(items))
    if isinstance(first, Mapping):
        return {key: stack_items([item[key] for item in items]) for key in first}
    if isinstance(first, tuple) and first:
        return tuple(map(stack_items, map(list, zip(*items, strict=True))))
    return items


def take_samples(batch: Any, start: int, stop: int) -> Any:
    """Return samples ``start`` to ``stop`` of a batch.

    Tensors have the samples along their first axis, lists have an entry for each; tuples and dicts
    are taken apart.
    """
    if isinstance(batch, torch.Tensor):
        return batch[start:stop] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: take_samples(part, start, stop) for key, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(take_samples(part, start, stop) for part in batch)
    return batch[start:stop] if isinstance(batch, list) else batch


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, torch.Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, Mapping):
        return {key: _moved(value, device) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return type(part)([_moved(value, device) for value in part])
    return part


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, Mapping | tuple | list):
        for value in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors(value)


def _number_and_seed(row: Draw | int) -> tuple[int, int]:
    return (row.index, seed_of(row)) if isinstance(row, Draw) else (row, row)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU within the context, and restore them at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
