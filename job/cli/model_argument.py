"""The argument MODEL of commands, and local copies of models and data in object stores."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import click

from job.cli.click_options import click_options
from job.cli.command_options import ModelOptions


def model_options(function: Any) -> Any:
    """Add the argument MODEL and the options that describe it to a command."""
    return click.argument("path", metavar="MODEL")(click_options(ModelOptions)(function))


def model_of(options: dict[str, Any]) -> ModelOptions:
    """Move the options of MODEL out of ``options``; copy data from an object store."""
    if "data" in options:
        options["data"] = data_of(options["data"])
    names = [field.name for field in fields(ModelOptions)]
    model = ModelOptions(**{name: options.pop(name) for name in names})
    return replace(model, path=local_model(model.path))


def data_of(path: str | None) -> str | None:
    """Return the path of a data set; one in an object store is copied first."""
    if path is None or "://" not in path:
        return path
    from job.artifacts.stored_data import local_data

    return local_data(path)


def local_model(path: str) -> str:
    """Return the path of a model; one in an object store is copied first."""
    if "://" not in path:
        return path
    from job.artifacts.stored_copy import local_path

    return local_path(path, weights=True)
