"""Load a state dict into a network, or report what does not fit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from job.console import counted
from job.errors import DataError, UsageError
from job.models.classifier import auxiliary_heads, find_head
from job.models.state_dict_keys import COUNTER, State, match_keys
from job.models.student import StudentNet

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn


# layers of torchvision's detectors whose outputs follow from the number of classes
DETECTOR_HEADS = "head.classification_head.", "roi_heads.box_predictor."


class LoadedWeights(NamedTuple):
    """Result of ``load_state``. ``notes`` are messages for the user about what was left out."""

    replaced_head: bool
    notes: tuple[str, ...]


def load_state(
    network: nn.Module,
    state: Mapping[str, torch.Tensor],
    source: str,
    *,
    replace_head: bool = False,
) -> LoadedWeights:
    """Load ``state`` into ``network``; raises DataError with what does not fit.

    ``source`` names the weights in messages. With ``replace_head``, a classifier of another number
    of classes is left out, and the network keeps its own.
    """
    expected = network.state_dict()
    state, notes = match_keys(state, expected)
    missing = {key: expected[key] for key in expected if _lacks_counter(key, state.get(key))}
    state = {**state, **missing}
    _check_keys(expected, state, source)
    misshapen = [key for key in expected if expected[key].shape != state[key].shape]
    head = _other_classes(network, state, misshapen) if misshapen else None
    if misshapen and not (head and replace_head):
        why = head.refusal if head else _other_shape(network, expected, state, misshapen)
        raise DataError(f"weights {source} do not fit the network: {why}")
    if head:
        notes = (*notes, head.replacement)
        state = {**state, **{key: expected[key] for key in misshapen}}
    _check_values(expected, state, source)
    load_tensors(network, state)
    return LoadedWeights(head is not None, tuple(f"weights {source}: {note}" for note in notes))


def load_tensors(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load ``tensors``, by the keys of the state dict of ``network``, as a state dict.

    A weights file lacks the version numbers of modules that a state dict contains. Some modules,
    e.g. torchvision's MNASNet, cannot be loaded without them.
    """
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(network.state_dict(), "_metadata", {})
    network.load_state_dict(state)


def count_classes(network: nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    """Return the number of classes in ``state``, by the classifier of ``network``, or None."""
    expected = network.state_dict()
    state, _ = match_keys(state, expected)
    name, _ = _find_head(network)
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    if weight is None or weight.shape[1:] != expected[f"{name}.weight"].shape[1:]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return len(weight)


def _find_head(network: nn.Module) -> tuple[str | None, int]:
    """Return the name of the head and its classes; (None, 0) if the network cannot run."""
    try:
        return find_head(network)
    except UsageError:
        return None, 0


def _lacks_counter(key: str, value: torch.Tensor | None) -> bool:
    """Return whether a BatchNorm counter is missing, or was converted to float."""
    return key.endswith(COUNTER) and (value is None or value.is_floating_point())


def _check_keys(expected: State, state: State, source: str) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    problems = [f"lack {_list_keys(missing)}"] if missing else []
    problems += [f"also have {_list_keys(unexpected)}"] if unexpected else []
    if problems:
        raise DataError(f"weights {source} do not fit the network: they {' and '.join(problems)}")


def _check_values(expected: State, state: State, source: str) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not value.double().isfinite().all():
            raise DataError(f"weights {source} contain values that are not finite, in {key}")
        if key.endswith("running_var") and (value.double() < 0).any():
            raise DataError(f"weights {source} contain a negative variance, in {key}")
        dtype = expected[key].dtype
        if value.is_floating_point() != dtype.is_floating_point:
            raise DataError(f"weights {source} have {key} in {value.dtype}, not {dtype}")


@dataclass(frozen=True)
class _OtherClasses:
    """Weights that differ from the network only in the number of classes."""

    layer: str
    weights_classes: int
    network_classes: int

    @property
    def refusal(self) -> str:
        classes = counted(self.weights_classes, "class")
        return f"they have {classes} instead of {self.network_classes} (the data or --num-classes)"

    @property
    def replacement(self) -> str:
        return (
            f"{self.refusal}: all weights are used except those of the classifier {self.layer}, "
            "which starts from random weights"
        )


class _OtherObjects(_OtherClasses):
    """Weights of a detector that differ from the network only in the number of classes."""

    @property
    def refusal(self) -> str:
        return "they are for another number of classes (the data or --num-classes)"


def _other_classes(network: nn.Module, state: State, misshapen: list[str]) -> _OtherClasses | None:
    """Return the difference if it is only the number of classes of classifiers, else None."""
    expected = network.state_dict()
    if all(key.startswith(DETECTOR_HEADS) for key in misshapen) and all(
        state[key].shape[1:] == expected[key].shape[1:] for key in misshapen
    ):
        return _OtherObjects(misshapen[0].rpartition(".")[0], 0, 0)
    name, network_classes = _find_head(network)
    heads = [str(name), *auxiliary_heads(network, network_classes)]
    weights_classes = {tuple(state[key].shape[:1]) for key in misshapen}
    if (
        f"{name}.weight" in misshapen
        and len(weights_classes) == 1
        and all(key.rpartition(".")[0] in heads for key in misshapen)
        and all(state[key].dim() == expected[key].dim() for key in misshapen)
        and all(state[key].shape[1:] == expected[key].shape[1:] for key in misshapen)
    ):
        return _OtherClasses(str(name), weights_classes.pop()[0], network_classes)
    return None


def _other_shape(network: nn.Module, expected: State, state: State, misshapen: list[str]) -> str:
    """Describe the first tensor of another shape, and what to type if its width may differ."""
    head = f"{_find_head(network)[0]}."
    key = next((key for key in misshapen if not key.startswith(head)), misshapen[0])
    difference = f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
    if any(state[key].dim() != expected[key].dim() for key in misshapen):
        return difference
    args = "width_mult=… (or base=…)" if isinstance(network, StudentNet) else "K=V"
    return (
        f"{difference}; if it was trained with another width, pass --model-arg {args}; "
        "to use a slim model, pass its run or model folder, not a weights file"
    )


def _list_keys(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
