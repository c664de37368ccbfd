"""State dicts as others save them: wrapped in a checkpoint, prefixed, under names of old.

What is found here is judged by the network: nothing is renamed unless the result fits it better.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from job.errors import DataError
from job.models.classifier import AUXILIARY
from job.models.notes import Note, quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    Tensors = Mapping[str, torch.Tensor]


class Inert:
    """What stands in for an object beside the tensors that is not looked at: it does nothing."""

    def __init__(self, *_: object) -> None:
        """Whatever the object was made from."""

    def __new__(cls, *_: object) -> Inert:
        """As above."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Whatever the object held."""


State = dict[str, torch.Tensor]

# where a checkpoint keeps its state dict, in the order of preference; averages only if alone
PLACES = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "model_state"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "weights"),
)
# what wrappers put into a name, at any place: DataParallel, torch.compile, FSDP, checkpointing
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OWNERS = {
    "model",
    "net",
    "network",
}  # where a training module, as Lightning's, has the network
AVERAGED = "n_averaged"  # of torch's AveragedModel
PROFILED = ("total_ops", "total_params")  # of every module that thop has counted
LIKELY = 64  # prefixes that are tried
COUNTER = "num_batches_tracked"  # of BatchNorm; files of before torch 0.4.1 have none
# torchvision's DenseNets of before 2018: denselayer1.norm.1.weight
OLD_DENSE = re.compile(
    r"(.*denselayer\d+\.(?:norm|relu|conv))\."
    r"([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))"
)


def unwrapped(loaded: Any) -> Any:
    """The state dict within a checkpoint, at most two deep, or ``loaded`` where there is none.

    Numbers and texts beside the tensors of a state dict are left out.
    """
    for _ in range(2):
        if not isinstance(loaded, dict) or _is_state(loaded):
            break
        for place in PLACES:
            inside = loaded.get(place)
            if isinstance(inside, dict) and inside:
                loaded = inside
                break
        else:
            break
    if isinstance(loaded, dict) and any(isinstance(v, torch.Tensor) for v in loaded.values()):
        return {key: value for key, value in loaded.items() if not _is_plain(value)}
    return loaded


def fitted(state: Mapping[str, torch.Tensor], own: Tensors, note: Note = quiet) -> State:
    """``state`` under the names of the network's ``own`` keys, as far as they can be told.

    What wrappers add to names is removed; a prefix of other kinds, with whatever does not have it,
    only when all of the network's keys then fit. ``note`` gets a line on tensors that are left out.
    Raises DataError when several prefixes fit.
    """
    plain = _unwrapped_names(state, own)
    for names in (plain, dict(state)):  # a network may have a module of a wrapper's name
        weights = {k: v for k, v in names.items() if k in own or not _is_bookkeeping(k)}
        whole = _renamed(weights, own)
        prefix = "" if _fits(whole, own) else _prefix(weights, own)
        if prefix or _fits(whole, own):
            break
    else:
        weights = {k: v for k, v in plain.items() if k in own or not _is_bookkeeping(k)}
    inside = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    beside = [key for key in weights if not key.startswith(prefix)]
    if beside:
        note(f"{len(beside)} tensors outside of {prefix}* are left out ({beside[0]} …)")
    named = _renamed(inside, own)
    if len(named) < len(inside):
        note(f"{len(inside) - len(named)} tensors of auxiliary classifiers are left out")
    return named


def _unwrapped_names(state: Tensors, own: Tensors) -> State:
    """Without wrappers' words in the names, where they stay different ones."""

    def name(key: str) -> str:
        if key in own:
            return key
        return ".".join(part for part in key.split(".") if part not in WRAPPERS)

    names = {key: name(key) for key in state}
    if len(set(names.values())) < len(names):
        return dict(state)
    return {names[key]: value for key, value in state.items()}


def _is_bookkeeping(key: str) -> bool:
    return key == AVERAGED or key.rpartition(".")[2] in PROFILED


def _prefix(state: Tensors, own: Tensors) -> str:
    """What all of the network's keys have in front of them in ``state``, or nothing."""
    first = next((key for key in own if not key.endswith(COUNTER)), "")
    found = {key[: -len(first)] for key in state if first and key.endswith(f".{first}")}
    shortest = sorted(sorted(found), key=len)[:LIKELY]
    fitting = [prefix for prefix in shortest if _fits(_under(prefix, state, own), own)]
    likely = [p for p in fitting if set(p[:-1].split(".")) <= OWNERS] or fitting
    if len(likely) > 1:
        raise DataError(
            f"the weights hold several networks, under {' and '.join(p + '*' for p in likely)}: "
            "save the one to use as its own state dict"
        )
    return likely[0] if likely else ""


def _under(prefix: str, state: Tensors, own: Tensors) -> State:
    inside = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    return _renamed(inside, own)


def _renamed(state: Mapping[str, torch.Tensor], own: Tensors) -> State:
    """Without names of old, and without auxiliary classifiers where the network has none."""
    names = {key: key if key in own else OLD_DENSE.sub(r"\1\2", key) for key in state}
    keep = any(key.startswith(AUXILIARY) for key in own)
    return {
        name: state[key] for key, name in names.items() if keep or not name.startswith(AUXILIARY)
    }


def _fits(state: Tensors, own: Tensors) -> bool:
    return {key for key in own if not key.endswith(COUNTER)} <= set(state) <= set(own)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, bytes, Inert))


def _is_state(loaded: Mapping[Any, Any]) -> bool:
    return bool(loaded) and all(isinstance(value, torch.Tensor) for value in loaded.values())
