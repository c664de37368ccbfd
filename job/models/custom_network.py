"""User networks named ``module:factory``: import, trust check, and call of the factory."""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
import typing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from job.data.pretrained import check_timm_name
from job.errors import UsageError, did_you_mean, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TIMM_FUNCTIONS = ("create_model", "models.")  # others are models of timm
_trusted: set[str] = set()  # factories that the user named in this process


def trust_factory(name: str) -> None:
    """Trust the factory ``name``, which the user gave: a model card may name it as well."""
    _trusted.add(name)


def call_factory(
    name: str, num_classes: int, args: Mapping[str, Any], *, from_card: bool
) -> nn.Module:
    """Import ``module:factory`` and call it, with ``num_classes`` if it accepts that argument.

    ``num_classes`` is 0 for a task without classes, and is then not passed on.

    ``from_card`` is true if the name comes from a model card. Raises UsageError if there is no such
    factory, if it fails, or if a card names a function that is not trusted.
    """
    if not from_card:
        trust_factory(name)
    factory = import_factory(name)
    if name not in _trusted and not _declares_network(factory):
        raise UsageError(
            f"{name} is a function of an installed package and is not annotated to return a "
            f"network (-> nn.Module); if you trust it, pass --model {name}"
        )
    try:
        parameters = [*inspect.signature(factory).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    if takes and num_classes:
        args = {**args, "num_classes": num_classes}
    return call_builder(name, factory, args)


def call_builder(name: str, build: Callable[..., Any], args: Mapping[str, Any]) -> nn.Module:
    """Call ``build(**args)`` and return the network ``name``.

    Raises UsageError if the call fails or does not return an ``nn.Module``.
    """
    try:
        network = build(**args)
    except Exception as error:  # user code may raise anything
        options = " ".join(
            f"--model-arg {key}={value}" for key, value in args.items() if key != "num_classes"
        )
        problem = f"does not take {options}" if options else "cannot be built"
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        why = f"{kind}{reason(error)}"
        if isinstance(error, TypeError) and "missing" in why and "required" in why:
            why += "; give it by --model-arg NAME=VALUE"
        raise UsageError(f"--model {name} {problem}: {why}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"--model {name} returned {type(network).__name__}: it must return a torch.nn.Module"
        )
    return network


def import_factory(name: str, option: str = "--model") -> Any:
    """Import the callable that ``module:factory`` names; raises UsageError if there is none.

    ``timm:NAME`` is a model of timm, which ``create_model`` builds, without trained weights.
    ``option`` is the one that names it.
    """
    module_name, _, path = name.partition(":")
    if (module_name, option) == ("timm", "--model") and not path.startswith(TIMM_FUNCTIONS):
        check_timm_name(path, f"{option} {name}")
        return partial(_import_module(name, module_name, option).create_model, path)
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise UsageError(f"{option} {name!r} is not of the form module:factory, e.g. nets:tiny")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise UsageError(f"{option} {name}: {module_name} is a module of Python itself")
    factory = _import_module(name, module_name, option)
    for part in path.split("."):
        if not hasattr(factory, part):
            callables = [key for key, value in vars(factory).items() if callable(value)]
            near = did_you_mean(part, callables)
            raise UsageError(f"{option} {name}: no {part} in {module_name}{near}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise UsageError(f"{option} {name} is a {type(factory).__name__}, which cannot be called")
    return factory


def _import_module(name: str, module_name: str, option: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # user code may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UsageError(
                f"{option} {name}: there is no module {missing}; run from the folder that has it, "
                "or name its folder in PYTHONPATH"
            ) from error
        why = f"{type(error).__name__}: {reason(error)}"
        raise UsageError(f"{option} {name}: importing {module_name} fails: {why}") from error


def _declares_network(factory: Any) -> bool:
    """Return whether a model card may have ``factory`` called with the arguments in the card.

    This holds for a subclass of ``nn.Module``, for a function that is annotated to return one, and
    for code outside of installed packages, which is the user's own. Any other function, e.g. one
    that deletes files, is refused.
    """
    factory = factory.func if isinstance(factory, partial) else factory
    if inspect.isclass(factory):
        return issubclass(factory, nn.Module)
    try:
        returned = typing.get_type_hints(factory).get("return")
        if inspect.isclass(returned) and issubclass(returned, nn.Module):
            return True
    except Exception:  # annotations cannot be resolved
        return False
    return is_own_code(factory)


def is_own_code(factory: Any) -> bool:
    """Return whether the source of ``factory`` is outside of installed packages and of Python."""
    try:
        source = inspect.getfile(inspect.unwrap(factory))
    except TypeError:  # it has no source file
        return False
    installed = {"site-packages", "dist-packages"} & set(Path(source).parts)
    return not installed and not source.startswith(sysconfig.get_path("stdlib"))
