"""Base of all commands: ``--config`` and ``--debug``, help, exit codes, errors on one line."""

from __future__ import annotations

import errno
import shlex
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from job.artifacts.stored_places import with_urls
from job.cli.config_file import config_option
from job.cli.environment import check_environment
from job.cli.help import write_examples, write_options
from job.cli.option_types import PerChannel
from job.cli.process_exit import exit_now
from job.console import print_error
from job.distributed.signals import ignore_requests, listen, stop_requested
from job.errors import (
    ConfigError,
    GammaslimError,
    InputNotFound,
    OutputError,
    StopRequest,
    StorageError,
    cannot,
    printable,
    shown,
)
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Iterator

REASON_FIRST = 5.0  # seconds to wait before reporting an error that another one may have caused


class Command(click.Command):
    """A command that takes ``--config``, its own environment variables, and ``--debug``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        debug = click.Option(["--debug"], is_flag=True, help="Show the traceback of an error.")
        self.params += [config_option(), debug]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Check the environment for misspelt options, then parse."""
        try:
            check_environment(self, ctx)
        except ConfigError as error:
            print_error(str(error))
            ctx.exit(error.exit_code)
        triples = {o for p in self.params if isinstance(p.type, PerChannel) for o in p.opts}
        ctx.allow_extra_args = True  # refused below, with better advice than click gives
        with _parsing(ctx):
            extra = super().parse_args(ctx, PerChannel.joined(args, triples))
            if extra and not ctx.resilient_parsing:
                ctx.fail(self._unexpected(extra, ctx))
        return extra

    def _unexpected(self, extra: list[str], ctx: click.Context) -> str:
        """Return the error message for arguments that the command does not take."""
        words = " ".join(map(shlex.quote, extra))
        if len(extra) > 1:
            return f"Got unexpected extra arguments ({words})"
        wants_data = "data" in ctx.params and not ctx.params["data"]
        hint = f"; did you mean --data {words}?" if wants_data else ""
        return f"Got unexpected extra argument ({words}){hint}"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then the options in sections."""
        write_examples(self, formatter)
        write_options(self, ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; end with a documented exit code and one line on stderr."""
        debug = ctx.params.pop("debug")
        try:
            listen()
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # not sys.exit(): CPython ends by SIGINT if the interrupt was raised within exec()
            self._fail(ctx, StopRequest("stopped by request", abrupt=True), debug)
        except GammaslimError as error:
            self._fail(ctx, error, debug)
        except RuntimeError as error:
            if not (processes := _processes()) or not processes.lost_others(error):
                raise
            lost = GammaslimError(f"the other processes are gone: {error}")
            lost.late = True
            self._fail(ctx, lost, debug)
        except OSError as error:
            self._fail(ctx, _storage_error(ctx, error), debug)
        finally:
            _leave()

    def _fail(self, ctx: click.Context, error: GammaslimError, debug: bool) -> None:
        if not error.reported and _reports(error):
            if debug:
                traceback.print_exception(error)
            print_error(with_urls(str(error)))
        if isinstance(error, StopRequest) and error.abrupt:
            _leave()
            exit_now(error.exit_code)
        ctx.exit(error.exit_code)


def _reports(error: GammaslimError) -> bool:
    """Return whether this process reports ``error``; first let an earlier failure be reported."""
    if isinstance(error, StopRequest):
        return is_main()
    if error.late and stop_requested():  # the launcher knows which process failed, and waits
        return False
    if error.late or not is_main():
        try:
            time.sleep(REASON_FIRST)
        except KeyboardInterrupt:  # the launcher ends this process
            return False
    return True


def _processes() -> Any:
    """Return job.distributed.collectives if it is loaded: commands of one process need no torch."""
    return sys.modules.get("job.distributed.collectives")


def _leave() -> None:
    ignore_requests()
    if processes := _processes():
        processes.leave()


@contextmanager
def _parsing(ctx: click.Context) -> Iterator[None]:
    """Escape control characters in click's errors; end with 74 where nobody reads the help."""
    try:
        yield
    except click.UsageError as error:
        message = error.format_message()
        if message.isprintable():
            raise
        raise click.UsageError(printable(message), error.ctx) from error
    except BrokenPipeError:
        ctx.exit(StorageError.exit_code)


class Group(click.Group):
    """The group of all commands."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command; escape control characters in its errors."""
        with _parsing(ctx):
            return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options before the command."""
        with _parsing(ctx) if args else nullcontext():  # without arguments the help is shown
            return super().parse_args(ctx, args)


def _storage_error(ctx: click.Context, error: OSError) -> GammaslimError:
    if error.errno == errno.ENAMETOOLONG:
        output = ctx.params.get("output")
        kind = OutputError if output and str(error.filename).startswith(output) else InputNotFound
        return kind(f"{shown(str(error.filename)[:40])}…: {error.strerror}")
    return cannot("read or write", error.filename or "standard output or an open file", error)
