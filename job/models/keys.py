"""State dicts as others save them: wrapped in a checkpoint, prefixed, under names of old.

What is found here is judged by the network: nothing is renamed unless the result fits it better.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from job.models.head import AUXILIARY
from job.models.notes import Note, quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    Tensors = Mapping[str, torch.Tensor]

State = dict[str, torch.Tensor]

# where a checkpoint keeps its state dict, in the order of preference; averages only if alone
PLACES = ("state_dict", "model", "model_state_dict", "net", "ema", "model_ema")
WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
OWNERS = ("model.", "net.")  # of a training module around the network, as Lightning's
COUNTER = "num_batches_tracked"  # of BatchNorm; files of before torch 0.4.1 have none
# torchvision's DenseNets of before 2018: denselayer1.norm.1.weight
OLD_DENSE = re.compile(
    r"(.*denselayer\d+\.(?:norm|relu|conv))\."
    r"([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))"
)


def unwrapped(loaded: Any) -> Any:
    """The state dict within a checkpoint, at most two deep, or ``loaded`` where there is none."""
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
    return loaded


def fitted(state: Mapping[str, torch.Tensor], own: Tensors, note: Note = quiet) -> State:
    """``state`` under the names of the network's ``own`` keys, as far as they can be told.

    Prefixes that a wrapper gives are removed; those of an owner only when all keys then fit.
    ``note`` gets a line when auxiliary classifiers are left out that the network has not.
    """
    count = len(state)
    best = named = _renamed(state, own)
    wrapped = True
    while not _fits(named, own):
        prefixes = (p for p in (*WRAPPERS, *OWNERS) if all(key.startswith(p) for key in state))
        prefix = next(prefixes, "") if state else ""
        if not prefix:
            named = best
            break
        state = {key[len(prefix) :]: value for key, value in state.items()}
        named = _renamed(state, own)
        wrapped = wrapped and prefix in WRAPPERS
        best = named if wrapped else best
    if len(named) < count:
        note(f"{count - len(named)} tensors of auxiliary classifiers are left out")
    return named


def _renamed(state: Mapping[str, torch.Tensor], own: Tensors) -> State:
    """Without names of old, and without auxiliary classifiers where the network has none."""
    names = {key: key if key in own else OLD_DENSE.sub(r"\1\2", key) for key in state}
    keep = any(key.startswith(AUXILIARY) for key in own)
    return {
        name: state[key] for key, name in names.items() if keep or not name.startswith(AUXILIARY)
    }


def _fits(state: Tensors, own: Tensors) -> bool:
    return {key for key in own if not key.endswith(COUNTER)} <= set(state) <= set(own)


def _is_state(loaded: Mapping[Any, Any]) -> bool:
    return bool(loaded) and all(isinstance(value, torch.Tensor) for value in loaded.values())
