"""Loader processes where TMPDIR is longer than a socket's path may be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from job.data import loader
from job.data.loader import SHORT_FOLDERS
from job.data.samplers import RankShare
from job.data.task_items import ItemSplit, TaskItems, stack_items
from job.errors import ConfigError, UsageError
from support.commands import ROOT, run
from support.datasets import write_flat

LOAD = """
import sys
from multiprocessing.util import get_temp_dir
from job.data.batches import PlainImages
from job.data.layout import open_data
from job.data.loader import Loader, iterate_batches
from job.data.preprocessing import Preprocessing
from job.data.samplers import RankShare
from job.distributed.collectives import leave
if __name__ == "__main__":
    images = PlainImages(open_data(sys.argv[1]).splits["training"], Preprocessing.of("small", 32))
    batches = Loader(images, RankShare(12, 4, 0, 1), workers=2, pin=False)
    print(sum(len(labels) for _, labels in iterate_batches(batches)), flush=True)
    print(get_temp_dir(), flush=True)
    leave()  # as the job does: its loader processes ignore signals
"""


def test_a_loader_process_ends_if_the_job_has_ended_before_it_was_ready() -> None:
    """The server imports torch for seconds, and hears of no end before it asks for the signal."""
    code = "from job.data.loader import prepare_worker; prepare_worker(); print('alive')"
    for parent, ends in ((os.getpid(), 0), (2**22 + 1, -signal.SIGKILL)):
        env = os.environ | {loader.JOB: str(parent), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, check=False)
        assert done.returncode == ends


def test_images_load_below_a_long_tmpdir(tmp_path: Path) -> None:
    data, script = write_flat(tmp_path / "data", {"training": 4}), tmp_path / "load.py"
    script.write_text(LOAD)
    long = tmp_path / ("x" * 100)
    long.mkdir()
    env = {"TMPDIR": str(long), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = run(sys.executable, script, data, env=env, fork=False)
    assert done.code == 0, done
    count, sockets = done.out.split()
    assert count == "12"
    assert str(Path(sockets).parent) in SHORT_FOLDERS
    assert not Path(sockets).exists()


def test_without_a_short_folder_the_error_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "SHORT_FOLDERS", (str(tmp_path / "none"),))
    loader._shorten_socket_paths()  # this TMPDIR is short
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 99)
    with pytest.raises(ConfigError, match=r"TMPDIR has 100 characters.* take 75 at most"):
        loader._shorten_socket_paths()
    assert tempfile.tempdir == "/" + "x" * 99


def test_data_that_cannot_be_pickled_name_the_remedy() -> None:
    class Local:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(3), index

    items = TaskItems(ItemSplit(Local(), stack_items, "mine:task\0"))
    batches = loader.Loader(items, RankShare(4, 2, 0, 1), workers=1, pin=False)
    with pytest.raises(UsageError, match=r"--workers 1 needs data .*pickle.*or use --workers 0"):
        next(iter(batches))
