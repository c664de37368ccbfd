"""GAMMASLIM_… variables: those that name no option are refused or warned of."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import click

from job.errors import did_you_mean, shown
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PREFIX = "GAMMASLIM_"
WARNED = "job.cli.environment.warned"
# what Kubernetes sets in every pod for a Service whose name begins with gammaslim
SERVICE = re.compile(r"_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$")


def check_environment(command: click.Command, ctx: click.Context) -> str:
    """What is wrong with a GAMMASLIM_<COMMAND>_… variable that is nearly an option's, or "".

    Others that nothing reads are warned of on stderr, once a process, on the main process only.
    """
    prefix = f"{ctx.auto_envvar_prefix}_"
    unread = sorted(set(_ours()) - set(_names(ctx, command)))
    known = {name.removeprefix(prefix) for name in _names(ctx, command) if name.startswith(prefix)}
    for name in unread:
        own = name.removeprefix(prefix)
        if own != name and (near := did_you_mean(own, known, 0.7)):
            near = near.replace("mean ", f"mean {prefix}")
            return f"the variable {shown(name)} names no option of {ctx.info_name}{near}"
    meta = ctx.find_root().meta
    if ctx.info_name == "launch" or not is_main():
        meta[WARNED] = True  # the launched process 0 warns
    if not meta.get(WARNED):
        for name in unread:
            near = _near(name, prefix, known, _names(ctx, command))
            click.echo(f"Warning: nothing reads the variable {shown(name)}{near}", err=True)
    return ""


def _near(name: str, prefix: str, known: Iterable[str], everything: Iterable[str]) -> str:
    """The variable that was meant: GAMMASLIM_RATE is taken for this command's own."""
    own = name.removeprefix(prefix).removeprefix(PREFIX)
    if near := did_you_mean(own, known, 0.7):
        return near.replace("mean ", f"mean {prefix}")
    near = did_you_mean(
        name.removeprefix(PREFIX), (n.removeprefix(PREFIX) for n in everything), 0.65
    )
    return near.replace("mean ", f"mean {PREFIX}")


def _ours() -> Iterator[str]:
    for name, value in os.environ.items():
        service = SERVICE.search(name) or (name.endswith("_PORT") and "://" in value)
        if name.startswith(PREFIX) and not service:
            yield name


def _names(ctx: click.Context, command: click.Command) -> set[str]:
    """The variables that ``command`` and the other commands read."""
    root = ctx.find_root()
    group = root.command
    commands = dict(group.commands) if isinstance(group, click.Group) else {}
    commands[str(ctx.info_name)] = command
    prefix = str(ctx.auto_envvar_prefix).removesuffix(f"_{str(ctx.info_name).upper()}")
    return {
        f"{prefix}_{name}_{p.name}".upper().replace("-", "_")
        for name, each in commands.items()
        for p in each.params
        if isinstance(p, click.Option)
    }
