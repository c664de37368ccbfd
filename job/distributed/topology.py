"""The nodes of a job: their number, which one this is, and the address of node 0.

The options of ``gammaslim launch`` take precedence over the environment variables of a launcher.
``LAUNCHERS`` is the table of launchers; to add one, add an entry.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from job.errors import UsageError

T = TypeVar("T")
Environ = Mapping[str, str]

PORT = 29500
SLURM_PORTS = range(20000, 32000)  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True)
class Nodes:
    """The rank of this node among ``count``, and the address of node 0."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = PORT


def _unknown(_environ: Environ) -> None:
    return None


@dataclass(frozen=True)
class Launcher:
    """The environment variables of a program that starts a process on each node.

    Each function returns None for an unknown value and raises UsageError for an invalid one.
    ``gpus`` is the number of GPUs of this node that are allocated to the job.
    """

    count: Callable[[Environ], int | None] = _unknown
    rank: Callable[[Environ], int | None] = _unknown
    address: Callable[[Environ], str | None] = _unknown
    port: Callable[[Environ], int | None] = _unknown
    gpus: Callable[[Environ], int | None] = _unknown


def find_nodes(
    environ: Environ,
    *,
    count: int | None = None,
    rank: int | None = None,
    address: str | None = None,
    port: int | None = None,
) -> Nodes:
    """Return the nodes of this job, each value from its option or the first launcher that sets it.

    Raises UsageError for a value that is missing or invalid.
    """
    launchers = LAUNCHERS.values()
    count = _first([count, *[launcher.count(environ) for launcher in launchers]]) or 1
    if count == 1:
        return Nodes()
    rank = _first([rank, *[launcher.rank(environ) for launcher in launchers]])
    port = _first([port, *[launcher.port(environ) for launcher in launchers]])
    # one by one: DNS may be slow
    address = address or _first(launcher.address(environ) for launcher in launchers)
    if rank is None:
        raise UsageError(f"--nnodes {count}: give --node-rank (or NODE_RANK) too, from 0")
    if not 0 <= rank < count:
        raise UsageError(f"--node-rank {rank} is not one of the {count} nodes 0 to {count - 1}")
    if address is None:
        raise UsageError(
            f"--nnodes {count}: give --master-addr (or MASTER_ADDR) too: the host of node 0"
        )
    return Nodes(count, rank, address, port or PORT)


def given_gpus(environ: Environ) -> tuple[str, int]:
    """Return the launcher that allocated GPUs of this node, and their number; 0 if unknown."""
    for name, launcher in LAUNCHERS.items():
        if count := launcher.gpus(environ):
            return name, count
    return "", 0


def nodes_left_out(environ: Environ) -> int:
    """Return how many nodes of a Slurm allocation a launch outside ``srun`` leaves idle."""
    if "SLURM_JOB_ID" not in environ or "SLURM_STEP_NUM_NODES" in environ:
        return 0
    return (_number(environ, "SLURM_NNODES") or 1) - 1


def _first(values: Iterable[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)


def _number(environ: Environ, *names: str) -> int | None:
    """Return the number in the first of the variables that is set and not empty."""
    for name in names:
        if text := environ.get(name):
            if not text.isdecimal():
                raise UsageError(f"{name}={text} is not a number")
            return int(text)
    return None


def _number_in(*names: str) -> Callable[[Environ], int | None]:
    return lambda environ: _number(environ, *names)


def _slurm_count(environ: Environ) -> int | None:
    """Return the nodes of the step; None in the batch script, which runs on one node only."""
    count = _number(environ, "SLURM_STEP_NUM_NODES")
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") or count
    if count and tasks != count:
        raise UsageError(
            f"srun started {tasks} tasks on {count} nodes, but launch starts the processes of a "
            "node itself: use srun --ntasks-per-node=1"
        )
    return count


def _in_slurm_step(read: Callable[[Environ], int]) -> Callable[[Environ], int | None]:
    return lambda environ: read(environ) if "SLURM_STEP_NUM_NODES" in environ else None


def _slurm_port(environ: Environ) -> int:
    return SLURM_PORTS[(_number(environ, "SLURM_JOB_ID") or 0) % len(SLURM_PORTS)]


def _slurm_first_host(environ: Environ) -> str | None:
    """Return the first host of the node list: ``a03-b`` for ``a[03-05,7]-b,c``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", environ.get("SLURM_STEP_NODELIST", ""))
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else None


def _first_pod(environ: Environ) -> str | None:
    """Return the host of pod 0, in the domain of this pod, which is named ``JOB-INDEX``."""
    index, host = environ.get("JOB_COMPLETION_INDEX"), socket.gethostname()
    if not index or not host.endswith(f"-{index}"):
        return None
    full = socket.getfqdn()
    domain = full.removeprefix(host) if full.startswith(f"{host}.") else ""
    return f"{host.removesuffix(index)}0{domain}"


LAUNCHERS = {
    "environment variables": Launcher(
        count=_number_in("NNODES", "PET_NNODES"),
        rank=_number_in("NODE_RANK", "PET_NODE_RANK"),
        address=lambda environ: environ.get("MASTER_ADDR") or environ.get("PET_MASTER_ADDR"),
        port=_number_in("MASTER_PORT", "PET_MASTER_PORT"),
    ),
    "Slurm": Launcher(
        count=_slurm_count,
        rank=_in_slurm_step(lambda environ: _number(environ, "SLURM_NODEID") or 0),
        address=_slurm_first_host,
        port=_in_slurm_step(_slurm_port),
        gpus=_in_slurm_step(lambda environ: _number(environ, "SLURM_GPUS_ON_NODE") or 0),
    ),
    # NNODES is the number of pods
    "a Kubernetes Indexed Job": Launcher(
        rank=_number_in("JOB_COMPLETION_INDEX"),
        address=_first_pod,
    ),
}
