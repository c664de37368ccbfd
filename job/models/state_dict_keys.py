"""Keys of state dicts: nested in checkpoints, prefixed by wrappers, or of older versions.

Keys are matched to those of the network. A key is renamed only if the result fits the network.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from job.console import counted
from job.errors import DataError
from job.models.classifier import AUXILIARY

if TYPE_CHECKING:
    from collections.abc import Mapping

    Tensors = Mapping[str, torch.Tensor]

State = dict[str, torch.Tensor]

# keys of the state dict in a checkpoint, by preference; averaged weights are the last choice
STATE_DICT_KEYS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "model_state"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "weights"),
)
# parts of keys that DataParallel, torch.compile, FSDP and activation checkpointing insert
WRAPPER_PARTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OWNER_PARTS = {"model", "net", "network"}  # attributes that hold the network, e.g. in Lightning
AVERAGED = "n_averaged"  # counter of torch's AveragedModel
PROFILED = ("total_ops", "total_params")  # counters that thop adds to every module
MAX_PREFIXES = 64  # limit of the prefixes that are tried
COUNTER = "num_batches_tracked"  # of BatchNorm; missing in files from before torch 0.4.1
# torchvision's DenseNets from before 2018: denselayer1.norm.1.weight
OLD_DENSENET = re.compile(
    r"(.*denselayer\d+\.(?:norm|relu|conv))\."
    r"([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))"
)


class Inert:
    """Stand-in for an object in a checkpoint that is neither imported nor read."""

    def __init__(self, *_: object) -> None:
        """Ignore the arguments of the object."""

    def __new__(cls, *_: object) -> Inert:
        """Ignore the arguments of the object."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Ignore the state of the object."""


def find_state_dict(loaded: Any) -> Any:
    """Return the state dict in a checkpoint, at most two levels deep, or ``loaded`` without one.

    Numbers and strings among the tensors of a state dict are left out.
    """
    for _ in range(2):
        if not isinstance(loaded, dict) or _is_state_dict(loaded):
            break
        inner = (loaded.get(key) for key in STATE_DICT_KEYS)
        content = next((value for value in inner if isinstance(value, dict) and value), None)
        if content is None:
            break
        loaded = content
    if isinstance(loaded, dict) and any(isinstance(v, torch.Tensor) for v in loaded.values()):
        return {key: value for key, value in loaded.items() if not _is_plain(value)}
    return loaded


def match_keys(state: Tensors, network: Tensors) -> tuple[State, tuple[str, ...]]:
    """Rename the keys of ``state`` to those of ``network``'s state dict where they match.

    Parts of keys that wrappers insert are removed. Any other prefix is removed only if all keys of
    the network then match; tensors without the prefix are left out. Returns the tensors, and a
    message for each kind of tensors left out. Raises DataError if several prefixes match.
    """
    weights, prefix = _strip(state, network)
    inside = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    outside = [key for key in weights if not key.startswith(prefix)]
    notes = []
    if outside:
        more = " …" if len(outside) > 1 else ""
        notes.append(
            f"left out: {counted(len(outside), 'tensor')} outside of {prefix}* ({outside[0]}{more})"
        )
    matched = _rename(inside, network)
    if len(matched) < len(inside):
        count = counted(len(inside) - len(matched), "tensor")
        notes.append(f"left out: {count} of auxiliary classifiers")
    return matched, tuple(notes)


def _strip(state: Tensors, network: Tensors) -> tuple[State, str]:
    """Return the tensors without wrapper parts and counters, and the prefix that matches."""
    unwrapped = _remove_wrapper_parts(state, network)
    for names in (unwrapped, dict(state)):  # the network may have such names itself
        weights = {k: v for k, v in names.items() if k in network or not _is_counter(k)}
        if _fits(_rename(weights, network), network):
            return weights, ""
        if prefix := _find_prefix(weights, network):
            return weights, prefix
    return {k: v for k, v in unwrapped.items() if k in network or not _is_counter(k)}, ""


def _remove_wrapper_parts(state: Tensors, network: Tensors) -> State:
    """Remove wrapper parts from the keys, unless two keys become equal."""

    def remove(key: str) -> str:
        if key in network:
            return key
        return ".".join(part for part in key.split(".") if part not in WRAPPER_PARTS)

    names = {key: remove(key) for key in state}
    if len(set(names.values())) < len(names):
        return dict(state)
    return {names[key]: value for key, value in state.items()}


def _is_counter(key: str) -> bool:
    return key == AVERAGED or key.rpartition(".")[2] in PROFILED


def _find_prefix(state: Tensors, network: Tensors) -> str:
    """Return the prefix that all keys of the network have in ``state``, or ""."""
    first = next((key for key in network if not key.endswith(COUNTER)), "")
    prefixes = {key[: -len(first)] for key in state if first and key.endswith(f".{first}")}
    shortest = sorted(sorted(prefixes), key=len)[:MAX_PREFIXES]
    fitting = [prefix for prefix in shortest if _fits(_under(prefix, state, network), network)]
    likely = [p for p in fitting if set(p[:-1].split(".")) <= OWNER_PARTS] or fitting
    if len(likely) > 1:
        raise DataError(
            f"the weights hold several networks, under {' and '.join(p + '*' for p in likely)}: "
            "save the one to use as its own state dict"
        )
    return likely[0] if likely else ""


def _under(prefix: str, state: Tensors, network: Tensors) -> State:
    inside = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    return _rename(inside, network)


def _rename(state: Tensors, network: Tensors) -> State:
    """Replace older keys; leave out auxiliary classifiers that the network does not have."""
    names = {key: key if key in network else OLD_DENSENET.sub(r"\1\2", key) for key in state}
    keep = any(key.startswith(AUXILIARY) for key in network)
    return {
        name: state[key] for key, name in names.items() if keep or not name.startswith(AUXILIARY)
    }


def _fits(state: Tensors, network: Tensors) -> bool:
    return {key for key in network if not key.endswith(COUNTER)} <= set(state) <= set(network)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, bytes, Inert))


def _is_state_dict(loaded: Mapping[Any, Any]) -> bool:
    return bool(loaded) and all(isinstance(value, torch.Tensor) for value in loaded.values())
