"""Fixtures of the tests that run whole commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.brightness import put, write_run
from support.datasets import write_noise_idx


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IDX files of 48 training and 20 validation images."""
    return write_noise_idx(tmp_path_factory.mktemp("noise") / "idx", 48, 20)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Class folders of the numbers 0 to 11, each as bright as its number says."""
    root = tmp_path / "data"
    for number in range(12):
        folders = [f"{split}/{number}/{i}.png" for split in ("train", "val") for i in range(2)]
        put(root, *folders, f"test/{number}.png", level=number)
    return root


@pytest.fixture
def run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a finished run on ``data`` by their formats, made without training."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    return write_run(folder, str(data))
