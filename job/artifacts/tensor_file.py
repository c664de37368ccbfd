"""Tensors in a safetensors file, written and read without a second copy in memory."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors``, contiguous and on the CPU, to ``path``; raises OSError."""
    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # safetensors has no other way to say that a disk is full
        number = _OS_ERROR.search(str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of ``path``, which may be replaced afterwards."""
    with safe_open(path, "pt") as file:
        # a clone, because the tensor is a part of the file mapped into memory
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
