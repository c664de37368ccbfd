"""Checks and conversions of the arguments of ``job.slim`` and ``job.sensitivity``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.errors import UsageError, did_you_mean
from job.slimming.graph.layer_rules import is_layer
from job.slimming.graph.layers import modules_of, owner_of
from job.slimming.inputs import (
    arguments_for,
    kind_of,
    map_tensors,
    move_like,
    sample_count,
    tensors_in,
)
from job.slimming.planning.target import TARGET_METRICS, Budget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.slimming.inputs import Example

PYTHON_NETWORK = "pass the nn.Module it was created from"
WRAPPER_ATTRIBUTES = {
    "OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module", "AveragedModel": "module",
}  # fmt: skip


def check_network(model: Any) -> None:
    """Raise UsageError, with what to pass instead, if the layers of ``model`` cannot be cut."""
    kind = type(model).__name__
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "a cut within torch.inference_mode() would make parameters that cannot be trained: "
            "call it outside; torch.no_grad() does no harm"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(f"model is a TorchScript module ({kind}): {PYTHON_NETWORK}")
    if kind == "ExportedProgram" or _is_exported(model):
        raise UsageError(f"model is a program of torch.export: {PYTHON_NETWORK}")
    if not isinstance(model, nn.Module):
        hint = ", e.g. build it and call load_state_dict" if isinstance(model, Mapping) else ""
        raise UsageError(f"model must be a torch.nn.Module{hint}; got {kind_of(model)}")
    if kind in WRAPPER_ATTRIBUTES:
        raise UsageError(f"model is wrapped in {kind}: pass model.{WRAPPER_ATTRIBUTES[kind]}")
    for name, module in modules_of(model, once=True).items():
        _check_layer(name, module)


def _is_exported(model: Any) -> bool:
    """Return whether ``model`` is a graph of ATen operators, as torch.export creates it."""
    return isinstance(model, torch.fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes
    )


def _check_layer(name: str, module: nn.Module) -> None:
    where = f"its layer {name}" if name else "it"
    weights = [p for p in module._parameters.values() if p is not None]
    if any(nn.parameter.is_lazy(p) for p in weights):
        raise UsageError(f"model has no weights yet ({where} is lazy): run it once first")
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(
            f"model has a TorchScript part ({name}), whose channels cannot be traced: "
            f"{PYTHON_NETWORK}"
        )
    made_by = type(module).__module__
    quantised = made_by.startswith(("torch.ao.", "torch.nn.quantized", "torchao.")) or (
        is_layer(module) and any(not p.is_floating_point() for p in weights)
    )
    if quantised or any(type(p).__module__.startswith("torchao") for p in weights):
        raise UsageError(
            f"model is quantised or prepared for quantisation ({where} is a "
            f"{type(module).__name__}): pass the floating-point network, and quantise the slim one"
        )


def example_of(model: nn.Module, example: Any) -> Example:
    """Return the example in the form of the network's arguments, on its device and in its dtype.

    Raises UsageError for anything that is not a batch of inputs.
    """
    if next(tensors_in(example), None) is None:
        numbers = isinstance(example, (tuple, list)) and all(type(n) is int for n in example)
        shape = ", ".join(map(str, example)) if numbers and example else "1, 3, 224, 224"
        raise UsageError(
            "example must be a batch of inputs of the network: a tensor, or a tuple, list or dict "
            f"of tensors, e.g. torch.rand({shape}); got {kind_of(example)}"
        )
    if not sample_count(example):
        raise UsageError("example is empty: give one sample, e.g. torch.rand(1, 3, 224, 224)")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    # the values of an example do not matter, and meta tensors have none
    values = map_tensors(example, lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t)
    inputs = arguments_for(model, values)
    if weight is not None:
        inputs = move_like(inputs, weight)
    return inputs


def budget_of(target: Any) -> Budget:
    """Parse ``target``; raises UsageError."""
    if not isinstance(target, str):
        pairs = target if isinstance(target, Mapping) else {"macs": target}
        name, value = next(((n, v) for n, v in pairs.items() if n in TARGET_METRICS), ("macs", 0.5))
        value = value if type(value) in (int, float) else 0.5
        got = kind_of(target)
        raise UsageError(f"target must be 'METRIC=VALUE', e.g. '{name}={value}'; got {got}")
    try:
        return Budget.parse(target)
    except UsageError as error:
        raise UsageError(f"target: {error}") from error


def check_choice(name: str, value: Any, choices: Sequence[str], *, none: bool = False) -> None:
    """Raise UsageError unless ``value`` is one of ``choices``, or None if ``none`` is set."""
    if value in choices or (none and value is None):
        return
    near = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise UsageError(f"{name} must be one of {', '.join(choices)}; got {value!r}{near}")


def check_number(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raise UsageError unless ``value`` is a number from ``least`` to ``most``.

    If ``most`` is infinite, it must be an integer.
    """
    kind, described = (Integral, "a whole number") if most == math.inf else (Real, "a number")
    is_number = isinstance(value, kind) and value is not True and value is not False
    if not is_number or not least <= value <= most:
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UsageError(f"{name} must be {described} {bounds}; got {value!r}")


def ignored_layers(model: nn.Module, ignore: Any) -> list[str]:
    """Return the names of the layers in ``ignore``, given by name or as modules.

    Raises UsageError for a layer that is not part of the network.
    """
    modules = modules_of(model)
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names_of.setdefault(module, []).append(name)
    if isinstance(ignore, (str, nn.Module)):
        ignore = [ignore]
    if not isinstance(ignore, Iterable):
        raise UsageError(f"ignore must be layers, by name or as modules; got {kind_of(ignore)}")
    names: list[str] = []
    for entry in ignore:
        if isinstance(entry, nn.Module):
            if entry not in names_of:
                kind = type(entry).__name__
                raise UsageError(f"ignore: a {kind} that is not part of the network")
            names += names_of[entry]
        else:
            names.append(_layer_name(model, modules, entry))
    return names


def _layer_name(model: nn.Module, modules: Mapping[str, nn.Module], entry: Any) -> str:
    if not isinstance(entry, str):
        raise UsageError(f"ignore must be names of layers, or modules; got {kind_of(entry)}")
    if entry and entry in modules:
        return entry
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    if entry in tensors:
        layer = owner_of(entry)
        return layer if is_layer(modules.get(layer)) else entry
    near = did_you_mean(entry, [*filter(None, modules), *tensors])
    raise UsageError(f"ignore: the network has no layer {entry!r}{near}")


def in_python(message: str) -> str:
    """Return ``message`` with command-line options replaced by Python argument names."""
    words = message.split("--")
    renamed = []
    for part in words[1:]:
        end = next((n for n, c in enumerate(part) if not (c.isalpha() or c == "-")), len(part))
        renamed.append(part[:end].replace("-", "_") + part[end:])
    return words[0] + "".join(renamed)
