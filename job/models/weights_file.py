"""Weights files: safetensors and torch files of any version, read without executing a pickle."""

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
from job.models.state_dict_keys import STATE_DICT_KEYS, Inert, State, find_state_dict

# packages whose objects hold scores, counters and times in checkpoints; they are not read
DATA_PACKAGES = {"numpy", "collections", "datetime", "pathlib", "decimal", "uuid"}
MAX_INERT = 64  # limit of classes and functions of these packages in one file
CHUNK = 16 << 20  # bytes read at a time


def read_state(path: str | Path) -> State:
    """Read the state dict in ``path`` to the CPU; raises InputNotFound, DataError or StorageError.

    Reads .safetensors files and, with ``weights_only=True``, torch files, zipped or legacy, saved
    on any device. Only the state dict of a checkpoint is returned.
    """
    path = Path(path)
    if not path.is_file():
        raise InputNotFound(f"weights {shown(path)} do not exist")
    try:
        loaded = _load(path)
    except StorageError:
        raise
    except Exception as error:  # torch's unpickler may raise anything on a damaged file
        raise DataError(f"weights {shown(path)} refused: {_refusal(path, error)}") from error
    loaded = find_state_dict(loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise DataError(f"weights {shown(path)} hold a {type(loaded).__name__}, not a state dict")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise DataError(
                f"weights {shown(path)} are not a state dict, and contain none under "
                f"{', '.join(STATE_DICT_KEYS)}: {key!r} is a {type(value).__name__}"
            )
        if value.is_meta or value.layout is not torch.strided or value.is_quantized:
            raise DataError(f"weights {shown(path)}: {key} is on meta, sparse or quantised")
    return dict(loaded)


def _load(path: Path) -> object:
    with reading(path), path.open("rb") as file:
        head = file.read(9)
        while file.read(CHUNK):  # a disk error would kill the process if the file were mapped
            continue
    if path.suffix.lower() == ".safetensors" or head[8:] == b"{":
        return load_safetensors(path)
    zipped = head.startswith(b"PK") and _unpacks_to_its_size(path)
    stand_ins: list[Any] = []  # (class, qualified name of the object that it replaces)
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore", UserWarning)
                # memory-mapped, like safetensors files, so that a file may be larger than memory
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            unsupported = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
            name = unsupported[1] if unsupported else ""
            if name.partition(".")[0] not in DATA_PACKAGES or len(stand_ins) == MAX_INERT:
                raise
            # nothing of that name is imported or called; a stand-in for a dict must be a dict
            stand_in = OrderedDict if name.endswith(("Dict", "CfgNode")) else Inert
            stand_ins.append((stand_in, name))


def _unpacks_to_its_size(path: Path) -> bool:
    """Return True; raises ValueError for a compressed file, since torch never compresses."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > size:
        raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}: torch never compresses")
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
