"""Start as many processes as the launcher was asked for: our own, or one that starts too few."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from job.distributed.cores import set_thread_variables
from job.distributed.signals import become, end_with_parent, starting
from job.distributed.topology import slurm_gpus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.distributed.topology import Nodes


def launch(command: Sequence[str], nproc: int | None, nodes: Nodes) -> int:
    """Run ``gammaslim COMMAND`` in ``nproc`` processes here, as part of ``nodes``; its exit code.

    By default one process for each GPU of this node, and one on a CPU, whose cores one process
    uses best.
    torch's elastic agent starts and watches them. Raises GammaslimError or StopRequest.
    """
    with starting():
        if nproc is None:
            nproc = _one_for_each_gpu()
        if nproc * nodes.count > 1:
            from job.distributed.agent import run_agent
    program = [sys.executable, "-m", "job", *command]
    if nproc * nodes.count == 1:
        become(program)
    set_thread_variables(nproc)
    return run_agent(program, nproc, nodes)


def _one_for_each_gpu() -> int:
    """The GPUs that torch sees; where it sees none, as many processes as Slurm gave GPUs."""
    import torch

    seen, given = torch.cuda.device_count(), slurm_gpus(os.environ)
    if seen < given:
        click.echo(
            f"Warning: Slurm gave {given} GPUs of {socket.gethostname()} to this job, torch sees "
            f"{seen}: look at the driver, torch's build, the container's --nv",
            err=True,
        )
    return seen or given or 1


def ensure_processes() -> None:
    """On a CPU, turn ``accelerate launch --num_processes N`` into N processes; may not return.

    Without GPUs its simple launcher starts a single process whatever N is (accelerate 1.15), and
    every accuracy would come from a world of one. This process then becomes ``launch`` with N.
    """
    if "RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return  # there is no launcher
    # not every launcher passes signals on: accelerate's and torch's leave their processes running
    # after a SIGUSR1 or SIGKILL
    end_with_parent(signal.SIGTERM)
    if "RANK" in os.environ:
        return
    count = _asked_of_accelerate(_parent_command())
    if count < 2:
        return
    import torch

    if torch.cuda.is_available():
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"
    launcher = [sys.executable, "-m", "job", "launch", f"--nproc={count}", "--nnodes=1", "--"]
    become([*launcher, *sys.argv[1:]])


def _parent_command() -> list[str]:
    try:
        content = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # no /proc, or the parent has gone
        return []
    return [os.fsdecode(part) for part in content.split(b"\0")[:-1]]


def _asked_of_accelerate(command: list[str]) -> int:
    """How many processes an ``accelerate launch …`` command line asks for; 0 when it is none."""
    options = _launch_options(command)
    if options is None:
        return 0
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    asked, _ = launch_command_parser().parse_known_args(options)
    if asked.num_processes is None:
        config = asked.config_file or default_config_file
        if Path(config).is_file():
            return int(load_config_from_file(config).num_processes)
    return int(asked.num_processes or 0)


def _launch_options(command: list[str]) -> list[str] | None:
    """What follows ``accelerate launch`` or ``accelerate-launch``, behind an interpreter or not."""
    for start, part in enumerate(command[:4]):
        name = Path(part).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[start + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli", "accelerate_cli.py"):
            return command[start + 2 :] if command[start + 1 : start + 2] == ["launch"] else None
    return None
