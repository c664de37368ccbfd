"""Weights files: safetensors and every kind of torch serialisation, never executing a pickle."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file as load_safetensors

from job.errors import DataError, InputNotFound, StorageError, reading, reason, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

State = dict[str, torch.Tensor]
CHUNK = 16 << 20  # bytes read at a time


def read_state(path: str | Path) -> State:
    """The state dict in ``path`` on the CPU; raises InputNotFound, DataError or StorageError.

    Reads .safetensors, and torch files of any age (zipped or legacy, saved on any device) with
    ``weights_only=True``.
    """
    path = Path(path)
    if not path.is_file():
        raise InputNotFound(f"weights {shown(path)} do not exist")
    try:
        loaded = _load(path)
    except StorageError:
        raise
    except Exception as error:  # torch's unpickler raises nearly anything on a damaged file
        raise DataError(f"weights {shown(path)} refused: {_refusal(path, error)}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise DataError(f"weights {shown(path)} hold a {type(loaded).__name__}, not a state dict")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise DataError(
                f"weights {shown(path)} are not a state dict: {key!r} is a {type(value).__name__}"
            )
        if value.is_meta or value.layout is not torch.strided or value.is_quantized:
            raise DataError(f"weights {shown(path)} hold {key} without plain numbers")
    return dict(loaded)


def _load(path: Path) -> object:
    with reading(path), path.open("rb") as file:
        head = file.read(9)
        while file.read(CHUNK):  # a disk that fails would kill a process that has it mapped
            continue
    if path.suffix.lower() == ".safetensors" or head[8:] == b"{":
        return load_safetensors(path)
    zipped = head.startswith(b"PK") and _unpacks_to_its_size(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # mapped, as safetensors are: what does not fit is refused before it fills the memory
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _unpacks_to_its_size(path: Path) -> bool:
    """True for a torch file of the zipped kind, whose entries are never compressed; or raises."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > size:
        raise ValueError(f"it unpacks to {unpacked:,} bytes from {size:,}: torch packs nothing")
    return True


def _refusal(path: Path, error: Exception) -> str:
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it holds Python code ({code[1]}), which is never executed: save model.state_dict()"
    if isinstance(error, pickle.UnpicklingError):
        with path.open("rb") as file:
            if file.read(1) == b"\x80":
                return (
                    "it is a pickle, which may hold Python code and is never executed: "
                    "save model.state_dict() with torch.save or safetensors"
                )
        return "it is no file of torch.save or safetensors, or it is damaged"
    return f"it is damaged ({reason(error)})"


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load ``state`` into ``network``; raises DataError that says what does not fit."""
    own = network.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    if missing or extra:
        parts = [f"lack {_some(missing)}"] * bool(missing) + [f"also have {_some(extra)}"] * bool(
            extra
        )
        raise DataError(f"weights {source} do not fit the network: they {' and '.join(parts)}")
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise DataError(f"weights {source} do not fit the network: {_mismatch(own, state, wrong)}")
    for key, value in state.items():
        if value.is_floating_point() and not value.double().isfinite().all():
            raise DataError(f"weights {source} hold values that are not finite, in {key}")
        if key.endswith("running_var") and (value.double() < 0).any():
            raise DataError(f"weights {source} hold a negative variance, in {key}")
        if value.is_floating_point() != own[key].is_floating_point():
            raise DataError(f"weights {source} hold {key} as {value.dtype}, not {own[key].dtype}")
    network.load_state_dict(state)


def _mismatch(own: State, state: Mapping[str, torch.Tensor], wrong: list[str]) -> str:
    """Say whether it is the number of classes or the width that differs, and what to type."""
    head = [key for key in wrong if key.startswith("fc.")]
    whole = all(state[key].dim() == own[key].dim() for key in wrong)
    if (
        whole
        and len(head) == len(wrong)
        and own["fc.0.weight"].shape[1:] == state["fc.0.weight"].shape[1:]
    ):
        theirs, ours = len(state["fc.0.weight"]), len(own["fc.0.weight"])
        return f"they have {theirs} classes, the data or --num-classes {ours}"
    key = next(key for key in wrong if key not in head) if len(head) < len(wrong) else wrong[0]
    theirs_shape, ours_shape = tuple(state[key].shape), tuple(own[key].shape)
    if not whole:
        return f"{key} is {theirs_shape}, expected {ours_shape}"
    return (
        f"{key} is {theirs_shape}, expected {ours_shape}: another width? "
        "pass --model-arg width_mult=… (or base=…) as it was trained"
    )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
