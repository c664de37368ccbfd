"""Which machine of a job this is: from options, Slurm's variables or a Kubernetes Indexed Job's."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

PORT = 29500
SLURM_PORTS = range(20000, 32000)  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True)
class Nodes:
    """This node's number among ``count``, and where the first one can be reached."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = PORT


def find_nodes(
    environ: Mapping[str, str],
    *,
    count: int | None = None,
    rank: int | None = None,
    address: str | None = None,
    port: int | None = None,
) -> Nodes:
    """The options given, then NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT (also PET_…), then Slurm.

    An Indexed Job tells its rank (JOB_COMPLETION_INDEX), and the host name of index 0 follows from
    this one's; how many pods there are must be said (NNODES). Raises UsageError.
    """
    slurm = _slurm_step(environ)
    index = environ.get("JOB_COMPLETION_INDEX")
    count = _first(count, _number(environ, "NNODES", "PET_NNODES"), slurm.get("count")) or 1
    if count == 1:
        return Nodes()
    rank = _first(
        rank,
        _number(environ, "NODE_RANK", "PET_NODE_RANK"),
        slurm.get("rank"),
        int(index) if index is not None else None,
    )
    address = (
        address
        or environ.get("MASTER_ADDR")
        or environ.get("PET_MASTER_ADDR")
        or _first_host(environ.get("SLURM_STEP_NODELIST", ""))
        or (_index_zero(socket.gethostname(), socket.getfqdn(), index) if index else None)
    )
    port = _first(port, _number(environ, "MASTER_PORT", "PET_MASTER_PORT"), slurm.get("port"), PORT)
    if rank is None:
        raise UsageError(f"--nnodes {count}: give --node-rank (or NODE_RANK) too, from 0")
    if not 0 <= rank < count:
        raise UsageError(f"--node-rank {rank} is not one of the {count} nodes 0 to {count - 1}")
    if not address:
        raise UsageError(
            f"--nnodes {count}: give --master-addr (or MASTER_ADDR) too: the host of node 0"
        )
    return Nodes(count, rank, address, port or PORT)


def nodes_left_out(environ: Mapping[str, str]) -> int:
    """How many nodes a Slurm allocation has that a launch outside of ``srun`` would not use."""
    if "SLURM_JOB_ID" not in environ or "SLURM_STEP_NUM_NODES" in environ:
        return 0
    return (_number(environ, "SLURM_NNODES") or 1) - 1


def slurm_gpus(environ: Mapping[str, str]) -> int:
    """How many GPUs of this node Slurm gave to this step; 0 outside of one."""
    if "SLURM_STEP_NUM_NODES" not in environ:
        return 0
    return _number(environ, "SLURM_GPUS_ON_NODE") or 0


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if text := environ.get(name):
            if not text.isdecimal():
                raise UsageError(f"{name}={text} is not a number")
            return int(text)
    return None


def _slurm_step(environ: Mapping[str, str]) -> dict[str, int]:
    """What ``srun`` says; nothing in the batch script itself, which is not on every node."""
    count = _number(environ, "SLURM_STEP_NUM_NODES")
    if count is None:
        return {}
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") or count
    if tasks != count:
        raise UsageError(
            f"srun started {tasks} tasks on {count} nodes, but launch starts the processes of a "
            "node itself: use srun --ntasks-per-node=1"
        )
    job = _number(environ, "SLURM_JOB_ID") or 0
    port = SLURM_PORTS[job % len(SLURM_PORTS)]
    return {"count": count, "rank": _number(environ, "SLURM_NODEID") or 0, "port": port}


def _first_host(nodelist: str) -> str | None:
    """The first of ``a[03-05,7]-b,c``: ``a03-b``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else None


def _index_zero(host: str, full: str, index: str) -> str | None:
    """The name of pod 0 in the same domain, where this pod is called ``JOB-INDEX``."""
    if not host.endswith(f"-{index}"):
        return None
    domain = full.removeprefix(host) if full.startswith(f"{host}.") else ""
    return f"{host.removesuffix(index)}0{domain}"
