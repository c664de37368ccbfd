"""The nodes of a job, as launchers tell them."""

from __future__ import annotations

import pytest

from job.distributed import topology
from job.distributed.topology import Launcher, Nodes, find_nodes, given_gpus

STEP = {"SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}


def test_a_launcher_is_an_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    flux = Launcher(
        count=lambda environ: int(environ["FLUX_NODES"]) if "FLUX_NODES" in environ else None,
        rank=lambda environ: 1,
        address=lambda environ: "flux0",
        gpus=lambda environ: 8,
    )
    monkeypatch.setitem(topology.LAUNCHERS, "Flux", flux)
    assert find_nodes({"FLUX_NODES": "2"}) == Nodes(2, 1, "flux0", 29500)
    assert find_nodes({"FLUX_NODES": "2", "NODE_RANK": "0"}, address="x") == Nodes(2, 0, "x", 29500)
    assert find_nodes({}) == Nodes()
    assert given_gpus({}) == ("Flux", 8)


def test_gpus_that_slurm_gave_count_within_a_step_only() -> None:
    assert given_gpus(STEP) == ("Slurm", 4)
    assert given_gpus({"SLURM_GPUS_ON_NODE": "4"}) == ("", 0)


def test_no_name_is_looked_up_where_the_address_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow() -> str:
        raise AssertionError("DNS may be slow")

    monkeypatch.setattr("socket.getfqdn", slow)
    environ = {"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "first"}
    assert find_nodes(environ) == Nodes(2, 1, "first", 29500)
