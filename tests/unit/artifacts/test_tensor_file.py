"""Tensors of any size in a file: no second copy in memory, and the errors of a full disk."""

from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from job.artifacts.tensor_file import read_tensors, write_tensors


def test_tensors_are_written_without_a_copy_of_them_in_memory(tmp_path: Path) -> None:
    tensors = {f"w{number}": torch.rand(500_000) for number in range(8)}
    tracemalloc.start()
    write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, peak  # 16 MB of tensors
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_were_read_are_not_a_view_of_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"w": torch.arange(5.0)})
    read = read_tensors(tmp_path / "file")
    with (tmp_path / "file").open("r+b") as file:
        file.seek(-20, 2)
        file.write(bytes(20))
    assert torch.equal(read["w"], torch.arange(5.0))


def test_an_error_of_the_storage_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        write_tensors(tmp_path / "missing" / "file", {"w": torch.zeros(1)})
    assert caught.value.errno == errno.ENOENT
