"""Plans as files of JSON: what ``Plan.save`` writes and ``Plan.load`` reads."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from job.errors import DataError, InputNotFound, OutputError, UsageError, shown
from job.files import is_file, read_json, write_bytes
from job.slimming.graph.groups import BlockedChannels
from job.slimming.graph.reasons import read_reason
from job.slimming.inputs import kind_of
from job.slimming.planning.cost import Cost
from job.slimming.planning.layer_channels import LayerChannels
from job.slimming.planning.measurements import PlannedLatency, Proof

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.files import JsonObject
    from job.slimming.planning.layer_channels import Kept, Layers
    from job.slimming.planning.overview import Sizes

PLAN_FORMAT = 1


class PlanFields(TypedDict):
    """The fields of a Plan."""

    policy: str
    width: float
    groups: Mapping[str, Kept]
    layers: Layers
    before: Cost | None
    after: Cost | None
    blocked: tuple[BlockedChannels, ...]
    sizes: Mapping[str, Sizes]
    method: str
    example: Any
    proof: Proof | None
    latency: PlannedLatency | None


def write_plan(path: str | Path, fields: Mapping[str, Any]) -> None:
    """Write the ``fields`` of a plan to a new file.

    Raises OutputError if ``path`` exists, StorageError if it cannot be written.
    """
    file = _path_of(path)
    if file.exists():
        raise OutputError(f"{shown(path)} already exists; choose another path")
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in _record(**fields).items())
    write_bytes(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_plan(path: str | Path) -> PlanFields:
    """Read the fields of a plan; raises InputNotFound, or DataError for another file."""
    file = _path_of(path)
    if not is_file(file):
        raise InputNotFound(f"{shown(path)} does not exist: expected a file of plan.save")
    try:
        content = read_json(file)
        if content["format"] != PLAN_FORMAT:
            raise DataError(
                f"format {content['format']} is not {PLAN_FORMAT}; use a newer gammaslim"
            )
        return _fields_of(content)
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{shown(path)} is not a plan: {why}") from error


def _path_of(path: Any) -> Path:
    if not isinstance(path, (str, Path)) or not str(path):
        raise UsageError(f"path must be a file; got {kind_of(path)}")
    return Path(path)


def _record(layers: Layers, **fields: Any) -> JsonObject:
    """Return the fields of a plan as JSON, indices last."""
    measured = ("before", "after", "proof", "latency")
    return {
        "format": PLAN_FORMAT,
        **{key: fields[key] for key in ("policy", "method", "width")},
        **{key: asdict(fields[key]) if fields[key] else None for key in measured},
        "example": _example_record(fields["example"]),
        "layers": {name: channels.to_dict() for name, channels in layers.items()},
        "groups": {name: list(kept) for name, kept in fields["groups"].items()},
        "sizes": {name: list(sizes) for name, sizes in fields["sizes"].items()},
        "blocked": [_blocked_record(each) for each in fields["blocked"]],
    }


def _blocked_record(blocked: BlockedChannels) -> list[str | int]:
    record: list[str | int] = [blocked.layer, blocked.channels, blocked.reason]
    return [*record, blocked.place] if blocked.place else record


def _fields_of(content: Any) -> PlanFields:
    """Return the fields of a plan; raises DataError, or another error of a wrong value."""
    width = float(content["width"])
    if not (math.isfinite(width) and width > 0):
        raise DataError(f"a width of {width}")
    policy, method = (_name_of(content, key) for key in ("policy", "method"))
    proof, latency = content["proof"], content["latency"]
    blocked = (
        BlockedChannels.by(str(name), int(count), read_reason(str(why)), "".join(map(str, place)))
        for name, count, why, *place in content["blocked"]
    )
    return {
        "policy": policy,
        "method": method,
        "width": width,
        "proof": None if proof is None else Proof(**proof),
        "latency": None if latency is None else PlannedLatency(**latency),
        "groups": {name: _indices(kept) for name, kept in content["groups"].items()},
        "layers": {n: LayerChannels.from_dict(values) for n, values in content["layers"].items()},
        "before": _cost_of(content["before"]),
        "after": _cost_of(content["after"]),
        "blocked": tuple(blocked),
        "sizes": {name: _sizes_of(sizes) for name, sizes in content["sizes"].items()},
        "example": _example_of(content["example"]),
    }


def _name_of(content: Any, key: str) -> str:
    name = content[key]
    if not isinstance(name, str):
        raise DataError(f"the {key} is not a name")
    return name


def _indices(kept: Any) -> Kept:
    if not isinstance(kept, list) or any(type(index) is not int or index < 0 for index in kept):
        raise DataError("a group's kept channels are not indices")
    return tuple(kept)


def _cost_of(values: Any) -> Cost | None:
    if values is None:
        return None
    if any(type(value) is not int for value in values.values()):
        raise DataError("costs are not numbers")
    return Cost(**values)


def _sizes_of(sizes: Any) -> tuple[int | None, int | None]:
    inputs, outputs = sizes
    if any(not (size is None or type(size) is int) for size in sizes):
        raise DataError("the sizes of a layer are not numbers")
    return inputs, outputs


def _example_record(example: Any) -> object:
    """Return an example without values as JSON; None if it has parts of other kinds."""
    try:
        return _to_json(example)
    except TypeError:
        return None


def _to_json(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        record = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return record | ({} if value.is_meta else {"values": value.tolist()})
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_json(part) for part in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _to_json(part) for key, part in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__}")


def _example_of(record: Any) -> Any:
    if record is None:
        return None
    if "shape" in record:
        dtype = getattr(torch, record["dtype"])
        if "values" in record:
            return torch.tensor(record["values"], dtype=dtype).reshape(record["shape"])
        return torch.empty(record["shape"], dtype=dtype, device="meta")
    ((kind, content),) = record.items()
    if kind == "dict":
        return {key: _example_of(part) for key, part in content.items()}
    if kind in ("list", "tuple"):
        parts = [_example_of(part) for part in content]
        return parts if kind == "list" else tuple(parts)
    return content
