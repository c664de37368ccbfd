"""Weights files: safetensors and every kind of torch serialisation, never executing a pickle."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file as load_safetensors

from job.errors import DataError, InputNotFound, StorageError, reading, reason, shown
from job.models.state_dict_keys import PLACES, Inert, State, unwrapped

# whose objects hold a checkpoint's scores, counters and times: they are not looked at
DATA_PACKAGES = {"numpy", "collections", "datetime", "pathlib", "decimal", "uuid"}
MOST_INERT = 64  # names of such objects
CHUNK = 16 << 20  # bytes read at a time


def read_state(path: str | Path) -> State:
    """The state dict in ``path`` on the CPU; raises InputNotFound, DataError or StorageError.

    Reads .safetensors, and torch files of any age (zipped or legacy, saved on any device) with
    ``weights_only=True``; of a checkpoint only the state dict within.
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
    loaded = unwrapped(loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise DataError(f"weights {shown(path)} hold a {type(loaded).__name__}, not a state dict")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise DataError(
                f"weights {shown(path)} are not a state dict, nor hold one under "
                f"{', '.join(PLACES)}: {key!r} is a {type(value).__name__}"
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
    inert: list[Any] = []
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(inert):
                warnings.simplefilter("ignore", UserWarning)
                # mapped, as safetensors are: too large a file is refused before it fills the memory
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
            data = found and found[1].partition(".")[0] in DATA_PACKAGES
            if not found or not data or len(inert) == MOST_INERT:
                raise
            # nothing of that name is imported, nor called; only plain dicts can be filled
            stand_in = OrderedDict if found[1].endswith(("Dict", "CfgNode")) else Inert
            inert.append((stand_in, found[1]))


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
        return (
            f"it holds Python code ({code[1]}), which is never executed: "
            "save model.state_dict() alone"
        )
    if isinstance(error, pickle.UnpicklingError):
        with path.open("rb") as file:
            if file.read(1) == b"\x80":
                return (
                    "it is a pickle, which may hold Python code and is never executed: "
                    "save model.state_dict() with torch.save or safetensors"
                )
        return "it is not a file of torch.save or safetensors, or it is damaged"
    return f"it is damaged ({reason(error)})"
