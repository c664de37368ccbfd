"""Load the task that ``--task`` names, and try it on a network before the first step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from job.config import CLASSIFICATION, DETECTION
from job.data.task_items import ItemSplit, TaskItems, stack_items
from job.errors import GammaslimError, InputNotFound, UsageError, did_you_mean, located, reason
from job.models.custom_network import import_factory, is_own_code
from job.slimming.inputs import tensors_in
from job.tasks.detection import Detection
from job.tasks.multi_label import MULTI_LABEL, MultiLabel
from job.tasks.segmentation import SEGMENTATION, Segmentation
from job.training.attempt import attempt
from job.training.epoch import ACCURACY
from job.training.objective import TaskObjective, as_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from job.training.task import Task

TASKS: dict[str, Callable[..., Any]] = {  # built-in tasks by name
    MULTI_LABEL: MultiLabel,
    SEGMENTATION: Segmentation,
    DETECTION: Detection,
}
RESERVED = ("loss", ACCURACY)  # in keys of metrics.jsonl
TRIED = 2  # items: a BatchNorm needs two


def load_task(
    name: str, given: Mapping[str, Any], typed: Sequence[str] = (), *, from_card: bool = False
) -> Task:
    """Build the task ``name`` with those of the ``given`` arguments that its factory takes.

    It must take those that the user ``typed`` as options.

    ``from_card`` tells that the name comes from a model card and not from the user: it must then be
    code outside of installed packages. Raises UsageError, or InputNotFound for missing files.
    """
    factory = _find_factory(name)
    if from_card and name not in TASKS and not is_own_code(factory):
        raise UsageError(
            f"{name} is the task of the model, and code of an installed package; if you trust it, "
            f"pass --task {name}"
        )
    parameters = _parameters(factory)
    for argument in () if name in TASKS else typed:
        if argument not in parameters:
            option = "--" + argument.replace("_", "-")
            raise UsageError(
                f"--task {name} does not take {option}: leave it out, or add the parameter "
                f"{argument} to {name.partition(':')[2]}"
            )
    try:
        task = factory(**{key: value for key, value in given.items() if key in parameters})
    except GammaslimError:
        raise
    except FileNotFoundError as error:
        raise InputNotFound(f"--task {name}: {reason(error)}") from error
    except Exception as error:  # user code may raise anything
        raise UsageError(f"--task {name} cannot be built: {located(error)}") from error
    _check_parts(name, task)
    return task  # type: ignore[no-any-return]


def brings_items(name: str) -> bool:
    """Return whether the items of the task ``name``, of a model card, need no ``--data``.

    False as well if its code is not found here, or belongs to an installed package.
    """
    if name in TASKS or ":" not in name:
        return False
    try:
        factory = _find_factory(name)
    except GammaslimError:
        return False
    return is_own_code(factory) and "data" not in _parameters(factory)


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a factory; none if they are unknown."""
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return MappingProxyType({})


def _find_factory(name: str) -> Any:
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        names = [CLASSIFICATION, *TASKS]
        raise UsageError(
            f"--task {name!r} is unknown{did_you_mean(name, names)}; tasks: {', '.join(names)}, or "
            "your own as module:factory"
        )
    return import_factory(name, "--task")


def _check_parts(name: str, task: Any) -> None:
    """Raise UsageError for a task that lacks a part."""
    for part in () if name == DETECTION else ("loss", "metrics"):
        if not callable(getattr(task, part, None)):
            raise UsageError(f"--task {name} returned {type(task).__name__}, which has no {part}()")
    for part in ("training", "validation"):
        items: Any = getattr(task, part, None)
        if not hasattr(items, "__len__") or not _is_readable(items):
            raise UsageError(
                f"--task {name}: its {part} must be a data set with __len__ and __getitem__; got "
                f"{type(items).__name__}"
            )
        if not len(items):
            raise UsageError(f"--task {name}: its {part} has no items")

    names, mark = getattr(task, "class_names", ()), getattr(task, "fingerprint", "")
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise UsageError(f"--task {name}: its class_names must be a list of texts; got {names!r}")
    if not isinstance(mark, str):
        raise UsageError(f"--task {name}: its fingerprint must be a text; got {mark!r}")


def _is_readable(items: Any) -> bool:
    return hasattr(items, "sample") or hasattr(items, "__getitem__")


def split_of(task: Task, name: str, items: Any) -> ItemSplit:
    """Return a data set of the task ``name`` as a split."""
    identity = f"{name}\0{getattr(task, 'fingerprint', '')}"
    return ItemSplit(items, getattr(task, "collate", stack_items), identity)


def input_shape_of(name: str, task: Task) -> tuple[int, ...]:
    """Return the shape of one input, e.g. (C, H, W), of the first training items."""
    inputs, _ = _first_batch(name, task)
    return tuple(inputs.shape[1:])


def try_task(
    name: str, task: Task, network: nn.Module, *, distilled: bool = False
) -> TaskObjective:
    """Return the objective of a task, after a pass of a copy of ``network`` over two items.

    Raises UsageError when the network, the loss or the metrics fail, or return something else;
    with ``distilled``, also when the loss of distillation fails.
    """
    inputs, targets = _first_batch(name, task)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        network = copy.deepcopy(network).cpu().train()
        shape = tuple(inputs.shape)
        outputs = attempt(f"--task {name}: the network fails on {shape}", network, inputs)
        loss = attempt(f"--task {name}: loss() fails", task.loss, outputs, targets)
        if distilled:
            soft: Any = task.distillation_loss  # type: ignore[attr-defined]
            attempt(f"--task {name}: distillation_loss() fails", soft, outputs, outputs, 1.0)
        with torch.no_grad():
            found = attempt(f"--task {name}: metrics() fails", task.metrics, outputs, targets)
    _check_loss(name, loss, trained=any(t.requires_grad for t in tensors_in(outputs)))
    objective = TaskObjective(task, _layout(name, found))
    if not hasattr(task, "scores"):
        _check_names(name, found)
        return objective
    cpu = torch.device("cpu")
    totals = {key: tuple(as_sums(part, cpu) for part in pair) for key, pair in found.items()}
    scores = attempt(f"--task {name}: scores() fails", task.scores, totals)
    if not isinstance(scores, dict) or not scores:
        raise UsageError(f"--task {name}: scores() must return a dict of metrics by name")
    _check_names(name, scores)
    return replace(objective, names=tuple(scores))


def _check_loss(name: str, loss: Any, *, trained: bool) -> None:
    """Raise UsageError if what ``loss`` returned is of no use for training ``trained`` outputs."""
    pair = isinstance(loss, tuple | list) and len(loss) == 2
    if not pair or not isinstance(loss[0], torch.Tensor) or loss[0].numel() != 1:
        raise UsageError(f"--task {name}: loss() must return a sum, as a tensor, and a count")
    if trained and not loss[0].requires_grad:
        raise UsageError(
            f"--task {name}: the sum that loss() returns has no gradient: compute it from the "
            "outputs by torch ops, without detach(), item() or numpy()"
        )
    if float(loss[1]) < 0:
        raise UsageError(
            f"--task {name}: loss() returns the count {float(loss[1]):g} for the first {TRIED} "
            "training items: the loss is the sum over the count, which must not be negative"
        )
    if loss[0].isnan():
        raise UsageError(f"--task {name}: loss() returns nan for the first {TRIED} training items")


def try_own_objective(name: str, task: Task, objective: Any, network: nn.Module) -> None:
    """Run two training items of a task with its own objective through a copy of ``network``.

    Raises UsageError if the network fails.
    """
    items = TaskItems(split_of(task, name, task.training))
    batch = items.__getitems__([index % len(task.training) for index in range(TRIED)])
    if isinstance(batch, GammaslimError):
        raise batch
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = objective.module(copy.deepcopy(network).cpu().train()).train()
        inputs, targets = objective.place(batch)
        outputs = attempt(f"--task {name}: the network fails", module, inputs)
        objective.measure(outputs, inputs, targets)


def _check_names(name: str, metrics: Iterable[str]) -> None:
    """Raise UsageError for a name that cannot be in keys."""
    for metric in metrics:
        if not str(metric).isidentifier() or not str(metric).isascii() or metric in RESERVED:
            raise UsageError(
                f"--task {name}: a metric is named {metric!r}: names are letters, digits and _, "
                f"and not {' or '.join(RESERVED)}"
            )


def _layout(name: str, found: Any) -> dict[str, int]:
    """Return the number of elements of each metric."""
    layout, cpu = {}, torch.device("cpu")
    if not isinstance(found, dict) or not found:
        raise UsageError(f"--task {name}: metrics() must return a dict of sums and counts by name")
    for metric, pair in found.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UsageError(f"--task {name}: the metric {metric} must be a sum and a count")
        sums, counts = (as_sums(part, cpu) for part in pair)
        if len(sums) != len(counts):
            raise UsageError(f"--task {name}: sums and counts of {metric} differ in number")
        if not (sums.isfinite().all() and counts.isfinite().all()):
            raise UsageError(
                f"--task {name}: metrics() returns a sum or count of {metric} that is not finite, "
                f"for the first {TRIED} training items"
            )
        layout[metric] = len(sums)
    return layout


def _first_batch(name: str, task: Task) -> tuple[torch.Tensor, Any]:
    """Return inputs and targets of the first training items, on the CPU."""
    items = TaskItems(split_of(task, name, task.training))
    numbers = [index % len(task.training) for index in range(TRIED)]
    message = f"--task {name}: its training items cannot be read"
    if not hasattr(task, "collate"):
        item = attempt(message, items.split.read, 0, 0)
        if not isinstance(item, tuple | list) or len(item) != 2:
            kind = type(item).__name__
            raise UsageError(f"--task {name}: an item must be a pair (inputs, targets); got {kind}")
    inputs, targets = attempt(message, items.batch, numbers)
    if convert := getattr(task, "inputs", None):
        inputs = attempt(f"--task {name}: inputs() fails", convert, inputs)
    if isinstance(inputs, tuple | list | dict) and not hasattr(task, "inputs"):
        raise UsageError(
            f"--task {name}: the inputs of a batch are a {type(inputs).__name__}; the job trains "
            "networks with one tensor as input. Cut a network with several inputs in a training "
            "loop of your own, by gammaslim.slim, or give the task inputs(), which makes one tensor"
        )
    fits = isinstance(inputs, torch.Tensor) and inputs.is_floating_point() and inputs.dim() > 1
    if not fits or len(inputs) != TRIED:
        what = f"{tuple(inputs.shape)} {inputs.dtype}" if hasattr(inputs, "shape") else type(inputs)
        remedy = "inputs() must convert it" if convert else "add inputs() to convert it"
        raise UsageError(
            f"--task {name}: a batch of {TRIED} items must have one float tensor ({TRIED}, …) as "
            f"inputs; got {what}: {remedy}"
        )
    return inputs, targets
