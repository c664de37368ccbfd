"""Load a state dict into a network, or say what does not fit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.errors import DataError, UsageError
from job.models.classifier import auxiliary_heads, find_head
from job.models.notes import Note, quiet
from job.models.state_dict_keys import COUNTER, State, fitted
from job.models.student import StudentNet

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn


def load_state(
    network: nn.Module,
    state: Mapping[str, torch.Tensor],
    source: str,
    *,
    replace_head: bool = False,
    note: Note = quiet,
) -> bool:
    """Load ``state`` into ``network``; raises DataError that says what does not fit.

    With ``replace_head`` a classifier of another number of classes is left out, and the network's
    own stays as it is: True then. ``note`` gets a line on what is left out.
    """
    own = network.state_dict()
    state = fitted(state, own, lambda line: note(f"weights {source}: {line}"))
    state = {**state, **{key: own[key] for key in own if _no_count(key, state.get(key))}}
    _check_keys(own, state, source)
    wrong = [key for key in own if own[key].shape != state[key].shape]
    head = _other_classes(network, state, wrong) if wrong else None
    if wrong and not (head and replace_head):
        why = head.refusal if head else _other_shape(network, own, state, wrong)
        raise DataError(f"weights {source} do not fit the network: {why}")
    if head:
        note(f"weights {source}: {head.replacement}")
        state = {**state, **{key: own[key] for key in wrong}}
    _check_values(own, state, source)
    load_tensors(network, state)
    return head is not None


def load_tensors(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load ``tensors``, by the names of ``network``'s own state dict and as if they were from it.

    Files of tensors lack the versions of modules that a state dict carries, and some modules refuse
    to load without (torchvision's MNASNet).
    """
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(network.state_dict(), "_metadata", {})
    network.load_state_dict(state)


def count_classes(network: nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    """How many classes the classifier in ``state`` tells apart, if it is one of ``network``'s."""
    own = network.state_dict()
    state = fitted(state, own)
    name, _ = _head(network)
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    if weight is None or weight.shape[1:] != own[f"{name}.weight"].shape[1:]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return len(weight)


def _head(network: nn.Module) -> tuple[str | None, int]:
    """As ``find_head``; none in a network that cannot be run, as after cuts that do not fit."""
    try:
        return find_head(network)
    except UsageError:
        return None, 0


def _no_count(key: str, value: torch.Tensor | None) -> bool:
    """Whether a BatchNorm's counter is missing, or was turned into a float as all else was."""
    return key.endswith(COUNTER) and (value is None or value.is_floating_point())


def _check_keys(own: State, state: State, source: str) -> None:
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    if missing or extra:
        parts = [f"lack {_some(missing)}"] * bool(missing) + [f"also have {_some(extra)}"] * bool(
            extra
        )
        raise DataError(f"weights {source} do not fit the network: they {' and '.join(parts)}")


def _check_values(own: State, state: State, source: str) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not value.double().isfinite().all():
            raise DataError(f"weights {source} hold values that are not finite, in {key}")
        if key.endswith("running_var") and (value.double() < 0).any():
            raise DataError(f"weights {source} hold a negative variance, in {key}")
        if value.is_floating_point() != own[key].is_floating_point():
            raise DataError(f"weights {source} hold {key} as {value.dtype}, not {own[key].dtype}")


@dataclass(frozen=True)
class _OtherClasses:
    """Weights whose classifier, and nothing else, is of another number of classes."""

    layer: str
    theirs: int
    ours: int

    @property
    def refusal(self) -> str:
        return f"they have {self.theirs} classes, the data or --num-classes {self.ours}"

    @property
    def replacement(self) -> str:
        return (
            f"they have {self.theirs} classes, the data or --num-classes {self.ours}: all is taken "
            f"but the classifier {self.layer}, which starts from random weights"
        )


def _other_classes(network: nn.Module, state: State, wrong: list[str]) -> _OtherClasses | None:
    """What differs when only classifiers do, and by nothing but their number of classes."""
    own = network.state_dict()
    name, ours = _head(network)
    heads = [str(name), *auxiliary_heads(network, ours)]
    theirs = {tuple(state[key].shape[:1]) for key in wrong}
    if (
        f"{name}.weight" in wrong
        and len(theirs) == 1
        and all(key.rpartition(".")[0] in heads for key in wrong)
        and all(state[key].dim() == own[key].dim() for key in wrong)
        and all(state[key].shape[1:] == own[key].shape[1:] for key in wrong)
    ):
        return _OtherClasses(str(name), theirs.pop()[0], ours)
    return None


def _other_shape(network: nn.Module, own: State, state: State, wrong: list[str]) -> str:
    """The first layer of another shape, and what to type when it may be the width."""
    head = f"{_head(network)[0]}."
    key = next((key for key in wrong if not key.startswith(head)), wrong[0])
    differ = f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
    if any(state[key].dim() != own[key].dim() for key in wrong):
        return differ
    args = "width_mult=… (or base=…)" if isinstance(network, StudentNet) else "K=V"
    return (
        f"{differ}: another width? pass --model-arg {args} as it was trained; "
        "a slim model is given by its run or model folder, not by a weights file"
    )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
