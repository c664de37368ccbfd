"""``--config``: option values from a TOML file or a built-in recipe."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import click

from job.cli.option_types import ProcessCount, RoundCount
from job.console import print_error
from job.errors import ConfigError, GammaslimError, InputNotFound, did_you_mean, shown
from job.files import parse_toml, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from job.files import JsonObject

RUN_TABLES = {"versions", "dataset", "base"}  # further tables of a run's config.toml
WHOLE_NUMBERS = (type(click.INT), RoundCount, ProcessCount)


def config_option() -> click.Option:
    """Return ``--config``, whose values become the defaults of the other options."""
    return click.Option(
        ["--config"],
        metavar="NAME|FILE",
        is_eager=True,
        expose_value=False,
        callback=_use_config,
        help=f"Recipe ({', '.join(_recipes())}) or TOML file with options.",
    )


def _use_config(ctx: click.Context, _param: click.Parameter, source: str | None) -> None:
    if source is None:
        return
    options = {p.name: p for p in ctx.command.params if isinstance(p, click.Option) and p.name}
    group = ctx.find_root().command
    commands = set(group.commands) if isinstance(group, click.Group) else set()
    try:
        name, tables = _read_config(source)
        values = _values_of(
            tables, name, str(ctx.info_name), commands, options.keys() - {"config", "debug"}
        )
        for key, value in values.items():
            _check_value(ctx, options[key], f"{name}: {key} = {value!r}", value)
    except GammaslimError as error:
        print_error(str(error))
        ctx.exit(error.exit_code)
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _recipes() -> list[str]:
    folder = resources.files("job") / "recipes"
    return sorted(
        file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")
    )


def _read_config(source: str) -> tuple[str, JsonObject]:
    """Read a recipe or a TOML file; return its name for messages, and its tables.

    Raises InputNotFound, or ConfigError for a file that cannot be read or is not valid TOML.
    """
    name = shown(source)
    try:
        if source in _recipes():
            name = f"recipe {source}"
            file = resources.files("job") / "recipes" / f"{source}.toml"
            return name, parse_toml(file.read_text("utf-8"))
        if "://" in source:  # of a run in an object store
            from job.artifacts.stored_copy import local_path

            source = local_path(source, weights=False)
        if not Path(source).is_file():
            raise InputNotFound(
                f"--config {name} is neither a file nor a recipe ({', '.join(_recipes())})"
            )
        text = read_bytes(Path(source)).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {name}: {error}") from error
    try:
        return name, parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error


def _values_of(
    tables: JsonObject, name: str, command: str, commands: set[str], options: Iterable[str]
) -> JsonObject:
    """Select the values of ``command``: keys at the top and in ``[command]``, by option name.

    Tables of other commands and of a run's own config.toml are ignored. Raises ConfigError for
    other tables, and for a key that is not an option.
    """
    chosen = tables.get(command, {})
    if not isinstance(chosen, dict):
        raise ConfigError(f"{name}: {command} must be a table, [{command}]")
    known_tables = commands | RUN_TABLES | {command}
    top = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    for table in tables.keys() - top.keys() - known_tables:
        near = did_you_mean(table, known_tables)
        raise ConfigError(f"{name}: [{table}] is not a table of gammaslim{near}")
    known_options = set(options)
    values = {}
    for key, value in {**top, **chosen}.items():
        field = key.replace("-", "_")
        if field not in known_options:
            near = did_you_mean(field, known_options)
            raise ConfigError(f"{name}: {key} is not an option of {command}{near}")
        values[field] = value
    return values


def _check_value(ctx: click.Context, option: click.Option, where: str, value: object) -> None:
    """Raise ConfigError unless ``option`` takes ``value``, which has a TOML type."""
    if isinstance(option.type, WHOLE_NUMBERS) and type(value) not in (int, str):
        raise ConfigError(f"{where}: not a whole number")
    if isinstance(value, bool) != option.is_flag:
        raise ConfigError(f"{where}: {'neither true nor false' if option.is_flag else 'a boolean'}")
    if "\0" in str(value):  # neither a path nor a name can contain it
        raise ConfigError(f"{where}: it contains a NUL character")
    try:
        option.type_cast_value(ctx, value)
    except click.BadParameter as error:
        raise ConfigError(f"{where}: {error.message}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
