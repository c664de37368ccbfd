"""What the commands share: configuration sources, exit codes, option types, groups of options."""

from __future__ import annotations

import errno
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from job.cli.environment import check_environment
from job.cli.exits import exit_now
from job.cli.help import write_examples, write_options
from job.cli.option_types import (
    POSITIVE,
    SEED,
    Crop,
    Finite,
    KeyValue,
    PerChannel,
    ProcessCount,
    Resizing,
    RoundCount,
    SplitName,
    Target,
    Transform,
)
from job.config import PruneConfig, read_toml, recipes
from job.console import tell_error
from job.data.geometry import INTERPOLATIONS
from job.distributed.signals import ignore_requests, listen, stop_requested
from job.errors import (
    ConfigError,
    GammaslimError,
    InputNotFound,
    OutputError,
    StopRequest,
    cannot,
    printable,
    shown,
)
from job.processes import is_main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULTS = PruneConfig()
REASON_FIRST = 5.0  # seconds that a process waits whose word may not be the first
option = partial(click.option, show_default=True)


class Command(click.Command):
    """A command that takes ``--config``, its own environment variables, and ``--debug``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = ", ".join(recipes())
        self.params += [
            click.Option(
                ["--config"], metavar="NAME|FILE", is_eager=True, expose_value=False,
                callback=_use_config, help=f"A recipe ({names}) or a TOML file of options.",
            ),
            click.Option(["--debug"], is_flag=True, help="Show a traceback with an error."),
        ]  # fmt: skip

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse after the environment has been checked for misspelt options."""
        if wrong := check_environment(self, ctx):
            _report(wrong)
            ctx.exit(ConfigError.exit_code)
        triples = {o for p in self.params if isinstance(p.type, PerChannel) for o in p.opts}
        with _quoting():
            return super().parse_args(ctx, PerChannel.joined(args, triples))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, then the options in sections."""
        write_examples(self, formatter)
        write_options(self, ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; end with a documented exit code and one line on stderr."""
        debug = ctx.params.pop("debug")
        try:
            listen()
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # by the usual way out, one raised within exec() would end Python by SIGINT (CPython)
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
            if error.errno == errno.EPIPE:  # `| head`: click ends quietly
                raise
            self._fail(ctx, _storage_error(ctx, error), debug)
        finally:
            _leave()

    def _fail(self, ctx: click.Context, error: GammaslimError, debug: bool) -> None:
        if not error.reported and _has_the_word(error):
            if debug:
                traceback.print_exception(error)
            _report(error)
        if isinstance(error, StopRequest) and error.abrupt:
            _leave()
            exit_now(error.exit_code)
        ctx.exit(error.exit_code)


def _has_the_word(error: GammaslimError) -> bool:
    """Let the process speak first that failed first; False when the launcher ends us meanwhile."""
    main = is_main()
    if isinstance(error, StopRequest):
        return main
    if error.late and stop_requested():  # the launcher knows who failed, and waits for our end
        return False
    if error.late or not main:
        try:
            time.sleep(REASON_FIRST)
        except KeyboardInterrupt:
            return False
    return True


def _processes() -> Any:
    """The module that knows of other processes, or None: a command that is alone loads no torch."""
    return sys.modules.get("job.distributed.collectives")


def _leave() -> None:
    ignore_requests()
    if processes := _processes():
        processes.leave()


@contextmanager
def _quoting() -> Iterator[None]:
    """Make click's messages, which quote what was typed, fit for a terminal."""
    try:
        yield
    except click.UsageError as error:
        message = error.format_message()
        if message.isprintable():
            raise
        raise click.UsageError(printable(message), error.ctx) from error


class Group(click.Group):
    """The commands; what is typed in place of one is quoted without its control characters."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click does it."""
        with _quoting():
            return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it."""
        with _quoting() if args else nullcontext():  # without any the help is shown
            return super().parse_args(ctx, args)


def _report(error: object) -> None:
    """The one line on stderr: it may quote names and values from outside."""
    tell_error(str(error))


def _storage_error(ctx: click.Context, error: OSError) -> GammaslimError:
    if error.errno == errno.ENAMETOOLONG:
        output = ctx.params.get("output")
        kind = OutputError if output and str(error.filename).startswith(output) else InputNotFound
        return kind(f"{shown(str(error.filename)[:40])}…: {error.strerror}")
    return cannot("read or write", error.filename or "standard output or an open file", error)


def _use_config(ctx: click.Context, _param: click.Parameter, source: str | None) -> None:
    if source is None:
        return
    command = ctx.command
    options = {p.name: p for p in command.params if isinstance(p, click.Option) and p.name}
    taken = [name for name in options if name not in ("config", "debug")]
    try:
        values = read_toml(source, str(ctx.info_name), taken)
        for name, value in values.items():
            _check_value(ctx, options[name], f"{shown(source)}: {name} = {value!r}", value)
    except GammaslimError as error:
        _report(error)
        ctx.exit(error.exit_code)
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _check_value(ctx: click.Context, option: click.Option, where: str, value: Any) -> None:
    """Raise ConfigError unless ``value``, of TOML, is one that ``option`` takes."""
    whole = isinstance(option.type, (type(click.INT), RoundCount, ProcessCount))
    if whole and type(value) not in (int, str):
        raise ConfigError(f"{where}: not a whole number")
    if isinstance(value, bool) != option.is_flag:
        raise ConfigError(f"{where}: {'neither true nor false' if option.is_flag else 'a boolean'}")
    if "\0" in str(value):  # in no path, nor in any name
        raise ConfigError(f"{where}: it holds a NUL character")
    try:
        option.type_cast_value(ctx, value)
    except click.BadParameter as error:
        raise ConfigError(f"{where}: {error.message}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def options_of(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order given."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


model_args = option(
    "--model-arg",
    type=KeyValue(),
    multiple=True,
    help="An argument of the network, e.g. width_mult=0.95 or aux_logits=true.",
)
MODELS = (
    "The network: student, vgg19-cifar, resnet164-cifar, densenet40-cifar, a torchvision "
    "classification name, or your own, module:factory."
)
num_classes = option("--num-classes", type=POSITIVE, help="Default: as in the data or weights.")
preprocessing = options_of(
    option(
        "--transform",
        type=Transform(),
        default=DEFAULTS.transform,
        help="How images become inputs: homework, small, imagenet, or as a package states it for "
        "its weights, timm:resnet50, torchvision:ResNet50_Weights.IMAGENET1K_V2. The options below "
        "override it. auto: small up to 64 pixels, else homework.",
    ),
    option("--image-size", type=POSITIVE, help="Side of the network's input, in pixels."),
    option(
        "--mean",
        type=PerChannel(),
        help="Subtracted from each channel, on the scale from 0 to 1: three numbers, or one.",
    ),
    option("--std", type=PerChannel(positive=True), help="What each channel is then divided by."),
    option(
        "--resize",
        type=Resizing(),
        help="Before the crop: 256 (the shorter side), 256x256 (both, not keeping the ratio), "
        "longer:256, or none.",
    ),
    option(
        "--crop",
        type=Crop(),
        help="The central crop: a share of the resized side, e.g. 0.875, or pixels: --image-size.",
    ),
    option("--interpolation", type=click.Choice(INTERPOLATIONS), help="How images are resized."),
)
running = options_of(
    option(
        "--on-bad-image",
        type=click.Choice(["fail", "skip"]),
        default=DEFAULTS.on_bad_image,
        help="What to do about an image that cannot be read.",
    ),
    option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default=DEFAULTS.device,
        help="auto: a GPU if there is one.",
    ),
    option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
        default=DEFAULTS.precision,
        help="auto: bf16 on a GPU that has it, fp32 on a CPU.",
    ),
    option("--workers", type=click.IntRange(0), help="Loader processes; default: by the cores."),
)
data_option = option(
    "--data",
    metavar="PATH",
    help="Folder with images or IDX files, or a CSV file; default: built-in Fashion-MNIST.",
)
model_options = options_of(
    click.argument("path", metavar="MODEL"),
    option("--model", help=f"Where MODEL is a weights file. {MODELS}"),
    model_args,
    num_classes,
    preprocessing,
)
json_option = click.option("--json", is_flag=True, help="Print JSON.")


def scoring(split: str, data: str) -> Callable[[Any], Any]:
    """What a command takes that runs MODEL over a split of ``data``, by default ``split``."""
    held_out = "Seed of a held-out split; default: that of MODEL's run."
    return options_of(
        model_options,
        option("--data", metavar="PATH", help=f"{data}; default: the data of MODEL's run."),
        option(
            "--split", type=SplitName(), help=f"Also train, val, dev or test. Default: {split}."
        ),
        running,
        option("--seed", type=SEED, help=held_out),
    )


def cutting(policy: str | None, target: str | None, *, best: bool = False) -> Callable[[Any], Any]:
    """How to cut; with ``best``, the default importance is the best that there is."""
    by_target = "" if policy else " Default: uniform to a width, else global."
    wide = "rate a round" if target is None else target
    return options_of(
        option(
            "--policy",
            type=click.Choice(["uniform", "global"]),
            default=policy,
            help="The same fraction of each group of channels, or one threshold over all."
            + by_target,
        ),
        option(
            "--target",
            type=Target(),
            default=target,
            help=f"What to leave: width, channels, params, macs or bytes = a fraction (at most 1) "
            f"or a number; default: {wide}.",
            show_default=False,
        ),
        option(
            "--round-to", type=POSITIVE, default=DEFAULTS.round_to,
            help="Keep a multiple of this many channels of a group.",
        ),
        option(
            "--min-keep", type=Finite(0, 1), default=DEFAULTS.min_keep,
            help="Fraction of a group that the global policy always keeps.",
        ),
        option(
            "--importance",
            type=click.Choice(["gamma", "l2", "random", "refit", "taylor"]),
            default=None if best else DEFAULTS.importance,
            help="What ranks channels" + "; default: refit with --data, else gamma" * best + ".",
        ),
    )  # fmt: skip
