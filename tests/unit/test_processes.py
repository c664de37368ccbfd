"""Which process is the main one, before and after the processes have joined."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from job.processes import is_main, rank, world_size


@pytest.mark.parametrize(
    ("variables", "main"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),  # of an outer job: this one is alone
        ({"RANK": "1"}, True),
    ],
)
def test_before_they_join_the_launchers_variables_decide(
    variables: dict[str, str], main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_main() == main
    assert (rank(), world_size()) == (0, 1)


def test_once_joined_the_rank_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_main()
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert is_main()
    finally:
        dist.destroy_process_group()


def test_no_torch_is_loaded_to_know_it() -> None:
    program = (
        "import sys; from job.processes import is_main; "
        "sys.exit(not is_main() or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
