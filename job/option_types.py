"""What the options take, beyond click's own types."""

from __future__ import annotations

import math
from typing import Any

import click

from job.errors import UsageError
from job.slimming.budget import Budget

POSITIVE = click.IntRange(1)
SEED = click.IntRange(0, 2**63 - 1)


class Finite(click.FloatRange):
    """A float within bounds, and neither infinite nor nan, which pass click's own comparison."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """As FloatRange does; fails for what is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class ProcessCount(click.ParamType):  # type: ignore[type-arg]
    """A number of processes, or ``auto`` (None)."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """The number; fails below 1."""
        if value in ("auto", None):
            return None
        return int(POSITIVE(value, param, ctx))


class KeyValue(click.ParamType):  # type: ignore[type-arg]
    """``K=V``, the value as an int, a float, true or false where it is one."""

    name = "K=V"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int | float | bool | str]:
        """Split and convert; fails without ``=``."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not (key and equals):
            self.fail(f"{value!r} is not of the form K=V", param, ctx)
        for kind in (int, float):
            try:
                return key, kind(text)
            except ValueError:
                continue
        return key, {"true": True, "false": False}.get(text.lower(), text)


class Target(click.ParamType):  # type: ignore[type-arg]
    """``METRIC=VALUE``: what to cut to, as job.slimming.budget reads it."""

    name = "METRIC=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The text, once it is known to be a target."""
        try:
            Budget.parse(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)
