"""Start the processes of one node, for ``launch`` or a launcher that starts too few."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from job.console import warn
from job.distributed.cores import set_thread_variables
from job.distributed.signals import become, end_with_parent, starting
from job.distributed.topology import given_gpus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.distributed.topology import Nodes


def launch(command: Sequence[str], nproc: int | None, nodes: Nodes) -> int:
    """Run ``gammaslim COMMAND`` in ``nproc`` processes of this node; return its exit code.

    The default is one process per GPU, or one process on a CPU, which uses all cores.
    torch's elastic agent starts and watches them. Raises GammaslimError or StopRequest.
    """
    with starting():
        if nproc is None:
            nproc = _default_nproc()
        if nproc * nodes.count > 1:
            from job.distributed.agent import run_agent
    program = [sys.executable, "-m", "job", *command]
    if nproc * nodes.count == 1:
        become(program)
    set_thread_variables(nproc)
    return run_agent(program, nproc, nodes)


def _default_nproc() -> int:
    """Return the number of GPUs that torch detects or, if it detects none, that were allocated."""
    seen, (launcher, given) = _detected_gpus(), given_gpus(os.environ)
    if seen < given:
        warn(
            f"{launcher} gave {given} GPUs of {socket.gethostname()} to this job, torch sees "
            f"{seen}: check the driver, torch's build, and the container's --nv"
        )
    return seen or given or 1


def _detected_gpus() -> int:
    """Return the number of GPUs that torch detects; without a driver torch is not imported."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not Path("/dev/kfd").exists():  # AMD's driver
            return 0
    import torch

    return torch.cuda.device_count()


def ensure_processes() -> None:
    """On a CPU, start N processes for ``accelerate launch --num_processes N``; may not return.

    Without GPUs Accelerate's simple launcher starts a single process for any N (version 1.15).
    This process then becomes a ``launch`` of N processes.
    """
    if "RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return  # there is no launcher
    # not every launcher forwards signals: after a SIGUSR1 or SIGKILL the processes of
    # accelerate and torchrun continue to run
    end_with_parent(signal.SIGTERM)
    if "RANK" in os.environ:
        return
    count = _accelerate_processes(_parent_command())
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
    except OSError:  # no /proc, or the parent has ended
        return []
    return [os.fsdecode(part) for part in content.split(b"\0")[:-1]]


def _accelerate_processes(command: list[str]) -> int:
    """Return the number of processes of an ``accelerate launch …`` command; 0 for another one."""
    options = _launch_options(command)
    if options is None:
        return 0
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    arguments, _ = launch_command_parser().parse_known_args(options)
    if arguments.num_processes is None:
        config = arguments.config_file or default_config_file
        if Path(config).is_file():
            return int(load_config_from_file(config).num_processes)
    return int(arguments.num_processes or 0)


def _launch_options(command: list[str]) -> list[str] | None:
    """Return the arguments of ``accelerate launch`` or ``accelerate-launch``; None for others."""
    for start, part in enumerate(command[:4]):
        name = Path(part).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[start + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli", "accelerate_cli.py"):
            return command[start + 2 :] if command[start + 1 : start + 2] == ["launch"] else None
    return None
