"""Tasks: what a network is trained for. The interface of a class that ``--task`` names.

class Shapes:
    def __init__(self, data=None):
        self.training, self.validation = ShapeImages(data, "train"), ShapeImages(data, "val")

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum"), targets.numel()

    def metrics(self, outputs, targets):
        return {"pixel_acc": ((outputs.argmax(1) == targets).sum(), targets.numel())}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Number = Any  # a number, or a tensor with one for each class
Metrics = Mapping[str, tuple[Number, Number]]  # the sum and the count of each metric by name


class Task(Protocol):
    """What a network is trained for: data, loss and metrics. Classes need not inherit from it.

    ``training`` and ``validation`` are map-style data sets of pairs (inputs, targets): they have a
    length and ``__getitem__(index)``. While an item is read, the global generators of Python, NumPy
    and torch are seeded by the epoch and the item, so that random augmentation resumes exactly. A
    data set with its own generators has ``sample(index, seed)`` instead. Inputs are one tensor.

    Optional attributes and methods:

    - ``class_names``: a factory of networks receives their number as ``num_classes``.
    - ``testing``: a data set for ``gammaslim evaluate --split testing``.
    - ``fingerprint``: a string that identifies the data; a run resumes only with the same one.
    - ``collate(items)``: make a batch (inputs, targets) from a list of pairs. By default tensors
      are stacked. Tensors of a batch have the samples along their first axis; lists have an entry
      for each sample.
    - ``inputs(batch)``: convert a batch of inputs on the device, e.g. uint8 to float32.
    - ``scores(totals)``: return the metrics by name, of the sums and counts (n,) float64 of the
      whole split by name, e.g. average precision of histograms; the first one chooses models.
    - ``distillation_loss(outputs, teacher_outputs, temperature)``: the sum that ``--distill-alpha``
      weights against the loss.
    """

    training: Any
    validation: Any

    def loss(self, outputs: Any, targets: Any) -> tuple[torch.Tensor, Number]:
        """Return the loss of a batch as its sum and the count that it is divided by.

        The gradient is that of the summed losses of the global batch over their summed counts, on
        any number of processes.
        """

    def metrics(self, outputs: Any, targets: Any) -> Metrics:
        """Return the sum and the count of each metric by name; the first one chooses models.

        The value of a metric is its total sum divided by its total count over the whole split. If
        they are tensors, e.g. the intersection and union of each class, the value is the mean ratio
        over the classes with a count. A metric whose counts are all 0 has no value, and is left
        out; the first one must have a value. Higher is better, and 1 is the best: differences are
        shown in percentage points.
        """
