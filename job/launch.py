"""Start as many processes as the launcher was asked for, where it would start only one."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def ensure_processes() -> None:
    """On a CPU, turn ``accelerate launch --num_processes N`` into N processes; may not return.

    Without GPUs its simple launcher starts a single process whatever N is (accelerate 1.15), and
    every accuracy would come from a world of one. This process then becomes torchrun with N.
    """
    if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    count = _asked_of_accelerate(_parent_command())
    if count < 2:
        return
    import torch

    if torch.cuda.is_available():
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    os.execv(sys.executable, [*launcher, f"--nproc-per-node={count}", "-m", "job", *sys.argv[1:]])


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
