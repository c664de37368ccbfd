"""Weights of StudentNet as the homework's users have them."""

from __future__ import annotations

from pathlib import Path

import torch

from job.models.factory import build_network
from support.cuts import randomise

State = dict[str, torch.Tensor]


def state(**args: float) -> State:
    """Random weights of a StudentNet of 11 classes."""
    return randomise(build_network("student", 11, args)).state_dict()


def save_as_the_homework_did(path: Path, values: State) -> None:
    """Legacy (non-zip) serialisation of tensors that lie on cuda:0, made without a GPU."""
    torch.save(values, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    location = b"X\x03\x00\x00\x00cpu"
    assert content.count(location) == 1  # the pickle memoises it
    content = content.replace(location, b"X\x06\x00\x00\x00cuda:0")
    for kind in (b"FloatStorage", b"LongStorage"):
        assert b"ctorch\n" + kind in content
        content = content.replace(b"ctorch\n" + kind, b"ctorch.cuda\n" + kind)
    path.write_bytes(content)
