"""Python interface: ``job.slim`` cuts a network, ``job.sensitivity`` measures what cuts cost."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.errors import UsageError
from job.slimming.analysis import analyse
from job.slimming.arguments import (
    budget_of,
    check_choice,
    check_network,
    check_number,
    example_of,
    ignored_layers,
    in_python,
)
from job.slimming.calibration.user_batches import read_batches
from job.slimming.compensation.methods import COMPENSATIONS
from job.slimming.compensation.recalibration import recalibrate_batchnorms
from job.slimming.cut import cut_network
from job.slimming.forward_call import forward_pass, own_forward_pass
from job.slimming.graph.saved_state import save_generators
from job.slimming.graph.snapshot import preserve_state
from job.slimming.group_sensitivity import measure_sensitivity
from job.slimming.importance.criteria import CRITERIA
from job.slimming.inputs import strip_values
from job.slimming.method import ALLOCATIONS, DEPTHS, choose_method
from job.slimming.new_objects import collecting_new_objects
from job.slimming.planning.allocation import Allocation
from job.slimming.planning.plan import keep_of
from job.slimming.planning.policies import POLICIES
from job.slimming.recovery.recovery import recover as recover_outputs
from job.slimming.sensitivity.output_loss import OUTPUT_LOSSES
from job.slimming.surgery.origin import record_origin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from job.slimming.calibration.batch import CalibrationBatch
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.inputs import Example
    from job.slimming.planning.plan import Plan
    from job.slimming.sensitivity.record import Sensitivity

LOGGER = logging.getLogger("gammaslim")


def slim(
    model: nn.Module,
    example: Any,
    *,
    policy: str = "global",
    target: str = "channels=0.5",
    round_to: int = 1,
    min_keep: float = 0.1,
    importance: str | None = None,
    compensate: str | None = None,
    allocate: str | None = None,
    output_loss: str | None = None,
    depth: str = "auto",
    recalibrate: int = 0,
    recover: int = 0,
    calibration: Iterable[Any] | None = None,
    calibration_images: int | None = None,
    ignore: Iterable[str | nn.Module] = (),
    forward: Callable[..., Any] | None = None,
) -> tuple[nn.Module, Plan]:
    """Return a narrow copy of ``model``, verified in float64, and the plan of the cut.

    ``example`` is a batch of inputs of ``model``: a tensor such as (B, C, H, W), a tuple or list
    of inputs, or a dict of keyword arguments; an input may be an object that holds tensors. Only
    its sizes and integers matter. ``forward`` is a function ``forward(model, …)`` of the network
    and these inputs, called in place of the forward pass. For a detector, which returns boxes, it
    calls the layers that are trained, e.g. ``lambda model, images:
    model.head(list(model.backbone(images).values()))`` for torchvision's RetinaNet.

    ``calibration`` is an iterable of batches like the example, or of pairs of such a batch and its
    labels (B,). The first ``calibration_images`` are used, by default at most 4,096, or 512 of 224
    pixels. It is required by the compensations ``mean`` and ``regress``, the importances ``refit``
    and ``taylor`` (which also needs labels), the allocation ``outputs``, ``recover``, and
    ``recalibrate``.

    If ``importance`` or ``compensate`` is None, the best choice is made and logged to the logger
    ``gammaslim``: ``refit`` and ``regress`` with ``calibration``, else ``gamma`` and ``none``.
    ``allocate`` selects what the policy ``global`` compares channel groups by: ``outputs``, the
    loss of the network's outputs when a group is cut, measured on a few calibration images, or
    ``local``, the importance of the channels. The default is ``outputs`` if ``compensate`` is
    ``regress``. The ``output_loss`` is ``kl``, the divergence of the softmax, for a single output
    (B, C), else ``squared_error``; give the latter for (B, C) that are no logits of classes, as in
    a regression. With ``outputs`` and the ``depth`` ``auto``, whole residual branches are also
    removed where the outputs lose least, and replaced by their mean, a constant. With the ``depth``
    ``off`` no branch is removed.

    After the cut, BatchNorm statistics are measured again on ``recalibrate`` batches, and the copy
    learns the outputs and features of ``model`` on the calibration images for ``recover`` epochs.

    The inputs and outputs of the layers in ``ignore``, given by name or as modules, are not cut.
    ``model`` is not changed. The copy has its device, mode and requires_grad. ``print(plan)`` shows
    what was cut.

    Raises UsageError for invalid arguments, a network that does not run on ``example``, or a target
    that is out of reach; DataError for weights that are not finite; GammaslimError if verification
    fails.

    >>> import torch, torchvision
    >>> import job
    >>> network = torchvision.models.resnet18(num_classes=10)
    >>> narrow, plan = job.slim(network, torch.rand(1, 3, 64, 64), target="macs=0.5")
    >>> plan.after.macs <= 0.5 * plan.before.macs
    True
    >>> narrow(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """
    check_network(model)
    _check_choices(policy, importance, compensate, allocate, depth)
    check_choice("output_loss", output_loss, OUTPUT_LOSSES, none=True)
    if calibration_images is not None:
        check_number("calibration_images", calibration_images, 1)
    check_number("recalibrate", recalibrate, 0)
    check_number("recover", recover, 0)
    allocation = _allocation(policy, target, round_to, min_keep)
    with forward_pass(model, forward), _naming_arguments():
        inputs, names = example_of(model, example), ignored_layers(model, ignore)
        runs = calibration is not None or allocation.budget.metric == "latency"
        graph = _analyse_example(model, inputs, names, trials=runs)  # else a proof stands for them
        images = _read_images(model, inputs, calibration, calibration_images, recalibrate, recover)
        batches = (lambda: images) if images else None
        method, reason = choose_method(
            importance, compensate, allocate, images=bool(images), depth=depth, policy=policy
        )
        method = replace(method, output_loss=output_loss)
        _log(reason)
        with _preserve_weights(model) if runs else _preserve_chance(model):
            narrow, plan = cut_network(
                model, graph, inputs, allocation, method, batches, tried=runs
            )
        if recalibrate:
            recalibrate_batchnorms(narrow, images[:recalibrate])
        if recover and batches:
            keep = keep_of(graph, plan.groups)
            recover_outputs(model, narrow, graph, keep, batches, int(recover))
    with _preserve_chance(model):
        record_origin(own_forward_pass(narrow), model, plan.layers)
    return narrow, replace(plan, example=None if forward else strip_values(inputs))


def sensitivity(
    model: nn.Module,
    example: Any,
    *,
    calibration: Iterable[Any],
    calibration_images: int | None = None,
    ignore: Iterable[str | nn.Module] = (),
    target: str | None = None,
    output_loss: str | None = None,
    forward: Callable[..., Any] | None = None,
) -> Sensitivity:
    """Return the loss of the outputs of ``model`` when each channel group alone is reduced.

    Each row of the result describes a channel group: its channels, its shares of the multiply-adds
    and the parameters, and the loss with 90, 75, 50, 25 and 0 % of its channels kept. The most
    important channels by ``refit`` are kept, and the next layers are refitted. For logits (B, C)
    the loss is the KL divergence of the softmax, in nats; for other outputs it is the squared error
    relative to the squares of the outputs. ``print(result)`` shows a table, ``result.to_dict()``
    returns plain values for JSON.

    ``example``, ``calibration``, ``calibration_images``, ``ignore``, ``output_loss`` and
    ``forward`` are those of ``slim``; labels are not used. With a ``target``, e.g. "macs=0.5", each
    row also has the number of channels that ``slim`` keeps with the same ``calibration`` and its
    other defaults. ``model`` is not changed.

    Raises UsageError for invalid arguments, a network that does not run on ``example``, or a target
    that is out of reach; DataError for weights or inputs of layers that are not finite.

    >>> import torch, torchvision
    >>> import job
    >>> network = torchvision.models.resnet18(num_classes=10)
    >>> images = torch.rand(16, 3, 64, 64)
    >>> measured = job.sensitivity(network, images[:1], calibration=[images])
    >>> [point.fraction for point in measured.rows[0].points]
    [0.9, 0.75, 0.5, 0.25, 0.0]
    """
    check_network(model)
    check_choice("output_loss", output_loss, OUTPUT_LOSSES, none=True)
    allocation = None if target is None else Allocation("global", budget_of(target))
    with forward_pass(model, forward), _naming_arguments():
        inputs, names = example_of(model, example), ignored_layers(model, ignore)
        graph = _analyse_example(model, inputs, names)
        images = read_batches(model, inputs, calibration, most=calibration_images)
        with _preserve_weights(model):
            return measure_sensitivity(
                model, graph, lambda: images, inputs, allocation, output_loss=output_loss
            )


def _check_choices(
    policy: str,
    importance: str | None,
    compensate: str | None,
    allocate: str | None,
    depth: str,
) -> None:
    check_choice("policy", policy, tuple(POLICIES))
    check_choice("importance", importance, tuple(CRITERIA), none=True)
    check_choice("compensate", compensate, tuple(COMPENSATIONS), none=True)
    check_choice("allocate", allocate, ALLOCATIONS, none=True)
    check_choice("depth", depth, DEPTHS)


def _allocation(policy: str, target: str, round_to: int, min_keep: float) -> Allocation:
    check_number("round_to", round_to, 1)
    check_number("min_keep", min_keep, 0, 1)
    return Allocation(policy, budget_of(target), int(round_to), float(min_keep))


def _read_images(
    model: nn.Module,
    inputs: Example,
    calibration: Iterable[Any] | None,
    calibration_images: int | None,
    recalibrate: int,
    recover: int,
) -> list[CalibrationBatch]:
    """Return the batches of ``calibration``; none without it, where no option needs them."""
    if calibration is not None:
        return read_batches(model, inputs, calibration, recalibrate, calibration_images)
    if recalibrate or recover:
        option = "recalibrate" if recalibrate else "recover"
        raise UsageError(f"{option} needs calibration batches")
    return []


@contextmanager
def _naming_arguments() -> Iterator[None]:
    """Replace command-line options in the message of a UsageError by Python argument names."""
    try:
        yield
    except UsageError as error:
        raise UsageError(in_python(str(error))) from error


def _analyse_example(
    model: nn.Module, inputs: Example, names: list[str], *, trials: bool = True
) -> ChannelGraph:
    try:
        with collecting_new_objects():
            return analyse(model, inputs, names, trials=trials)
    except UsageError as error:
        single = isinstance(inputs, torch.Tensor) and inputs.dim() == 3
        hint = "; for a single image give example[None], a batch of one" if single else ""
        raise UsageError(f"example: {error}{hint}") from error


@contextmanager
def _preserve_weights(model: nn.Module) -> Iterator[None]:
    """Restore all that forward passes of the network change, its weights included."""
    with preserve_state(model, values=False) as snapshot:
        snapshot.keep_values(t for t in snapshot.tensors if isinstance(t, nn.Parameter))
        yield


@contextmanager
def _preserve_chance(model: nn.Module) -> Iterator[None]:
    """Restore the random generators, where only copies of the network run, for a short time."""
    generators = save_generators(model.parameters())
    try:
        with collecting_new_objects():
            yield
    finally:
        for generator in generators:
            generator.restore()


def _log(message: str) -> None:
    """Log a message, unless it is empty, or print it to stderr if logging is not configured."""
    if not message:
        return
    if LOGGER.hasHandlers():
        LOGGER.info(message)
    elif LOGGER.level <= logging.INFO:
        print(f"gammaslim: {message}", file=sys.stderr)
