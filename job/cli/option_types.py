"""Types of options that click does not provide."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, get_args

import click

from job.config import PresetName, TrackerName, WeightsPackage
from job.data.geometry import Channels, Resize, parse_channels, parse_crop
from job.data.split_names import CANONICAL, SPLIT_NAMES
from job.errors import UsageError, did_you_mean, shown
from job.files import shell_word
from job.slimming.planning.target import Budget

POSITIVE = click.IntRange(1)
# for a file; a folder needs --recursive too
COPY_COMMANDS = {"s3": "aws s3 cp", "gs": "gcloud storage cp"}


class Finite(click.FloatRange):
    """A finite float within bounds: infinity and nan can pass click's own comparison."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Convert as FloatRange does; fail for a number that is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class SplitChoice(click.Choice):  # type: ignore[type-arg]
    """A split, by its canonical name or by an alias such as train, val, dev or test."""

    def __init__(self) -> None:
        super().__init__(tuple(SPLIT_NAMES))

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the canonical name."""
        return super().convert(CANONICAL.get(str(value).lower(), value), param, ctx)


class TrackerChoice(click.Choice):  # type: ignore[type-arg]
    """One of the trackers, or several that are separated by commas."""

    def __init__(self) -> None:
        super().__init__(get_args(TrackerName))

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return a tuple of the names."""
        words = value if isinstance(value, (tuple, list)) else str(value).split(",")
        return tuple(super(TrackerChoice, self).convert(str(w).strip(), param, ctx) for w in words)

    @staticmethod
    def joined(_ctx: click.Context, _param: click.Parameter, values: Any) -> tuple[str, ...]:
        """Return the names of all repetitions of the option, each once."""
        return tuple(dict.fromkeys(name for names in values for name in names))


class ProcessCount(click.ParamType):  # type: ignore[type-arg]
    """A number of processes, or ``auto`` (None)."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """Return the number, or None for ``auto``; fail below 1."""
        if value in ("auto", None):
            return None
        return _whole(value, POSITIVE, self, param, ctx)


class RoundCount(click.ParamType):  # type: ignore[type-arg]
    """A number of rounds, or ``auto``."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """Return the number, or ``auto``; fail below 0."""
        return "auto" if value == "auto" else _whole(value, click.IntRange(0), self, param, ctx)


def _whole(
    value: Any, bounds: click.IntRange, kind: click.ParamType[Any], param: Any, ctx: Any
) -> int:
    try:
        int(value)
    except ValueError:
        kind.fail(f"{value!r} is neither a whole number nor auto", param, ctx)
    return int(bounds(value, param, ctx))


class KeyValue(click.ParamType):  # type: ignore[type-arg]
    """``K=V``, where the value becomes an int, a float or a bool if it looks like one."""

    name = "K=V"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, int | float | bool | str]:
        """Split and convert; fail without ``=``."""
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


class BatchSizes(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers of at least 1, separated by commas."""

    name = "N,N,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Return the numbers, each once; fail below 1."""
        words = value if isinstance(value, (tuple, list)) else str(value).split(",")
        try:
            sizes = tuple(dict.fromkeys(int(str(word)) for word in words))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, e.g. 1,32", param, ctx)
        if not sizes or min(sizes) < 1:
            self.fail(f"{value!r}: a batch size is at least 1", param, ctx)
        return sizes


class Target(click.ParamType):  # type: ignore[type-arg]
    """``METRIC=VALUE``, as job.slimming.planning.target parses it."""

    name = "METRIC=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the text; fail if it is not a target."""
        try:
            Budget.parse(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Transform(click.ParamType):  # type: ignore[type-arg]
    """A preset, or the weights whose preprocessing to use: timm:NAME, torchvision:WEIGHTS."""

    name = "NAME"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the text; whether the package knows its name is checked when it is used."""
        text, known = str(value), ("auto", *get_args(PresetName))
        package, colon, name = text.partition(":")
        if text in known or (package in get_args(WeightsPackage) and colon and name):
            return text
        names = [*known, "timm:NAME", "torchvision:WEIGHTS"]
        message = f"{text!r} is not one of {', '.join(names)}{did_you_mean(text, names)}"
        return str(self.fail(message, param, ctx))


class PerChannel(click.ParamType):  # type: ignore[type-arg]
    """One number for all channels, or three, possibly as separate words; see ``joined``."""

    name = "R G B"

    def __init__(self, *, positive: bool = False) -> None:
        self.positive = positive

    def convert(self, value: Any, param: Any, ctx: Any) -> Channels:
        """Return three numbers from 0 to 1."""
        try:
            return parse_channels(value, positive=self.positive)
        except UsageError as error:
            self.fail(str(error), param, ctx)

    @staticmethod
    def joined(args: list[str], names: set[str]) -> list[str]:
        """Join the three numbers after each option of ``names`` in ``args`` into one word."""
        words, rest = [], list(args)
        while rest:
            words.append(word := rest.pop(0))
            if word == "--":
                return words + rest
            if word in names and len(rest) >= 3 and all(map(_is_number, rest[:3])):
                words.append(" ".join(rest[:3]))
                del rest[:3]
        return words


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class LocalPath(click.ParamType):  # type: ignore[type-arg]
    """A path on this machine, where the URL of an object store cannot be used."""

    name = "PATH"

    def __init__(self, *, read: bool = False) -> None:
        self.read = read

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the path; fail for a URL, with the command that copies it."""
        text = str(value)
        scheme, separator, rest = text.partition("://")
        if not separator or "/" in scheme:
            return text
        url, name = text.rstrip("/"), rest.rstrip("/").rpartition("/")[2] or "NAME"
        words = (url, name) if self.read else (name, url)
        source, target = map(shell_word, words)
        copy = f"{COPY_COMMANDS.get(scheme, 'cp -r')} {source} {target}"
        advice = (
            f"copy it first, and give --{param.name.replace('_', '-')} {shell_word(name)}"
            if self.read
            else f"give a local path, e.g. {shell_word(name)}, and copy it afterwards"
        )
        return str(self.fail(f"{shown(text)} is a URL: {advice}: {copy}", param, ctx))


# declares an option as click.option does, for a path on this machine
local_path_option = partial(click.option, type=LocalPath())


class Resizing(click.ParamType):  # type: ignore[type-arg]
    """``256``, ``256x256``, ``longer:256`` or ``none``."""

    name = "PIXELS"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the text; fail if it is none of these."""
        try:
            return str(Resize.parse(str(value)))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Crop(click.ParamType):  # type: ignore[type-arg]
    """A fraction of the resized side, or pixels."""

    name = "FRACTION|PIXELS"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Return the number."""
        try:
            return parse_crop(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


# types by field name; the types of all other options follow from their annotations
OPTION_TYPES: dict[str, click.ParamType[Any]] = {
    "split": SplitChoice(),
    "transform": Transform(),
    "mean": PerChannel(),
    "std": PerChannel(positive=True),
    "resize": Resizing(),
    "crop": Crop(),
    "model_arg": KeyValue(),
    "rounds": RoundCount(),
    "tracker": TrackerChoice(),
    "target": Target(),
    "weights": LocalPath(read=True),
    "teacher": LocalPath(read=True),
    "batch_sizes": BatchSizes(),
}
