"""What the options take, beyond click's own types."""

from __future__ import annotations

import math
from typing import Any

import click

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
    """``K=V``, the value as an int or a float where it is one."""

    name = "K=V"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int | float | str]:
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
        return key, text


class Target(click.ParamType):  # type: ignore[type-arg]
    """``width=V``: what to cut to."""

    name = "METRIC=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """The width as a float in (0, 1]."""
        if isinstance(value, float):
            return value
        metric, _, text = str(value).partition("=")
        if metric != "width":
            self.fail(f"{value!r} is not of the form width=VALUE", param, ctx)
        return float(Finite(0, 1, min_open=True)(text, param, ctx))
