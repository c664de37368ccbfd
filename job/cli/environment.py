"""Check GAMMASLIM_… variables: a misspelt option is an error, other unused ones are warnings."""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING

import click

from job.console import warn
from job.errors import ConfigError, closest, did_you_mean, shown
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "GAMMASLIM_"
CLOSE, CLOSE_TO_ANY = 0.7, 0.65  # similarity to a variable of the command, or of any command
WARNED = "job.cli.environment.warned"
# set by Kubernetes in every pod for a Service whose name begins with gammaslim
SERVICE = re.compile(r"_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$")


def check_environment(command: click.Command, ctx: click.Context) -> None:
    """Raise ConfigError for a GAMMASLIM_<COMMAND>_… variable that nearly matches an option.

    Warn of other variables that nothing reads, once, on the main process.
    """
    prefix, variables = f"{ctx.auto_envvar_prefix}_", _variables(ctx, command)
    prefixed = [variable for variable in variables if variable.startswith(prefix)]
    unread = sorted(name for name in _ours() if name not in variables)
    for name in unread:
        meant = closest(name, prefixed, CLOSE, prefix=prefix) if name.startswith(prefix) else None
        if meant:
            option = "--" + meant.removeprefix(prefix).lower().replace("_", "-")
            raise ConfigError(
                f"{ctx.info_name} does not read {shown(name)}: type "
                f"{meant}={shown(shlex.quote(os.environ[name]))} to set {option}, or unset "
                f"{shown(name)}"
            )
    meta = ctx.find_root().meta
    if ctx.info_name == "launch" or not is_main():
        meta[WARNED] = True  # the main one of the launched processes warns
    if not meta.get(WARNED):
        for name in unread:
            # GAMMASLIM_RATE is first taken for an option of this command
            short = prefix + name.removeprefix(prefix).removeprefix(PREFIX)
            hint = did_you_mean(short, prefixed, CLOSE, prefix=prefix)
            hint = hint or did_you_mean(name, variables, CLOSE_TO_ANY, prefix=PREFIX)
            warn(f"nothing reads the variable {shown(name)}{hint}")


def _ours() -> Iterator[str]:
    """Yield the variables that are meant for Gammaslim."""
    for name, value in os.environ.items():
        service = SERVICE.search(name) or (name.endswith("_PORT") and "://" in value)
        if name.startswith(PREFIX) and not service:
            yield name


def _variables(ctx: click.Context, command: click.Command) -> set[str]:
    """Return the variables that ``command`` and the other commands read."""
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
