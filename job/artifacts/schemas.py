"""JSON Schemas of the files of a run, made of their records: ``python -m job.artifacts.schemas``.

The files are in ``job/schemas``; a test compares them with the records. A file may have more keys
than its schema: later versions add some.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from job.artifacts.evaluation_record import RoundEvaluation
from job.artifacts.model_card import FORMAT, ModelCard
from job.artifacts.records import (
    EpochRecord,
    GammaRecord,
    LatencyRecord,
    ResumeRecord,
    RoundRecord,
    SlimRecord,
    StatusRecord,
    StopRecord,
    SummaryRecord,
)
from job.artifacts.run_status import RunStatus
from job.data.preprocessing import Preprocessing
from job.slimming.planning.layer_channels import LayerChannels
from job.slimming.sensitivity.record import Sensitivity
from job.training.epoch import ACCURACY

Schema = dict[str, Any]
SCHEMA_FOLDER = Path(__file__).parent.parent / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
EVENTS = (EpochRecord, RoundRecord, SlimRecord, GammaRecord, StopRecord, ResumeRecord)
SIMPLE: dict[object, Schema] = {
    int: {"type": "integer"}, float: {"type": "number"}, str: {"type": "string"},
    bool: {"type": "boolean"}, type(None): {"type": "null"}, Any: {}, object: {},
}  # fmt: skip
METRIC = (
    "Metric of another task than classification: in keys, its name replaces acc, as valid_miou."
)
INDICES: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
OWN_FORMATS: dict[object, Schema] = {
    LayerChannels: {
        "type": "object",
        "properties": {
            "in": INDICES, "out": INDICES, "select": INDICES, "places": INDICES,
            "bias": {"type": "boolean"}, "line": {"type": "integer", "minimum": 1},
        },
    },
    Preprocessing: {
        "type": "object",
        "properties": {"preset": {"type": "string"}, "size": {"type": "integer", "minimum": 1}},
        "required": ["preset", "size"],
    },
}  # fmt: skip


def all_schemas() -> dict[str, Schema]:
    """Return each schema by the name of its file in ``job/schemas``."""
    return {
        "status.json": _titled("status.json of a run", schema_of(StatusRecord)),
        "summary.json": _titled("summary.json of a run", schema_of(SummaryRecord)),
        "model.json": _titled("model.json of a model", _versioned(schema_of(ModelCard), FORMAT)),
        "evaluation.json": _titled("evaluation.json of a round", schema_of(RoundEvaluation)),
        "sensitivity.json": _titled("sensitivity.json of a round", schema_of(Sensitivity)),
        "latency.json": _titled("latency.json of a round", schema_of(LatencyRecord)),
        "metrics.json": _titled("a line of metrics.jsonl of a run", {"oneOf": _events()}),
        "log.json": _titled("a line of --log json", {"oneOf": [*_log_events(), *_logged_events()]}),
        "run_status.json": _titled("status --json", _object({
            "format": {"const": 1}, "runs": {"type": "array", "items": schema_of(RunStatus)},
        })),
    }  # fmt: skip


def schema_of(kind: type) -> Schema:
    """Return the schema of the JSON that ``to_json`` makes of a dataclass."""
    if kind in OWN_FORMATS:
        return OWN_FORMATS[kind]
    hints = get_type_hints(kind)
    properties: Schema = {}
    required: list[str] = []
    scores: list[str] = []
    for field in fields(kind):
        key = str(field.metadata.get("key", field.name.removesuffix("_")))
        name = key.replace("{metric}", ACCURACY)
        properties[name] = _type_schema(hints[field.name], kind)
        if field.default is MISSING and field.default_factory is MISSING:
            (required if name == key else scores).append(name)
    if not scores:
        return {"type": "object", "properties": properties, "required": required}
    properties["metric"] = {"type": "string", "description": METRIC}
    either = [{"required": scores}, {"required": ["metric"]}]
    return {"type": "object", "properties": properties, "required": required, "anyOf": either}


def _type_schema(hint: Any, owner: type) -> Schema:
    """Return the schema of a value of type ``hint``; ``owner`` is the class of its field."""
    if hint in SIMPLE:
        return SIMPLE[hint]
    if hint in OWN_FORMATS:
        return OWN_FORMATS[hint]
    if hint is owner:  # a record inside itself
        return {"type": "object"}
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type_schema(each, owner) for each in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": _type_schema(args[0], owner)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _type_schema(args[1], owner)}
    if is_dataclass(hint) and isinstance(hint, type):
        return schema_of(hint)
    if is_typeddict(hint):
        return {"type": "object"}
    raise TypeError(f"{owner.__name__} has a field of type {hint}, which has no JSON Schema")


def _events() -> list[Schema]:
    found = []
    for kind in EVENTS:
        schema = schema_of(kind)
        schema["properties"] = {"event": {"const": kind.EVENT}, **schema["properties"]}
        schema["required"] = ["event", *schema["required"]]
        found.append(schema)
    return found


def _logged_events() -> list[Schema]:
    """Return the lines of metrics.jsonl as a log has them, with their time."""
    return [
        {
            **schema,
            "properties": {"time": SIMPLE[float], **schema["properties"]},
            "required": ["time", *schema["required"]],
        }
        for schema in _events()
    ]


def _log_events() -> list[Schema]:
    text, time = SIMPLE[str], SIMPLE[float]
    plain = {"time": time, "event": {"enum": ["message", "warning", "error"]}, "text": text}
    share = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]}
    progress = {
        "time": time, "event": {"const": "progress"}, "phase": text, "share": share, "text": text,
    }  # fmt: skip
    summary = schema_of(SummaryRecord)
    summary["properties"] = {
        "time": time, "event": {"const": "summary"}, "path": text, **summary["properties"],
    }  # fmt: skip
    summary["required"] = ["time", "event", "path", *summary["required"]]
    return [_object(plain), _object(progress), summary]


def _object(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _versioned(schema: Schema, version: int) -> Schema:
    properties = {"format": {"const": version}, **schema["properties"]}
    return {**schema, "properties": properties, "required": ["format", *schema["required"]]}


def _titled(title: str, schema: Schema) -> Schema:
    return {"$schema": DIALECT, "title": title, **schema}


def schema_text(schema: Schema) -> str:
    """Return the content of the file of a schema."""
    return json.dumps(schema, indent=1) + "\n"


def main() -> None:
    """Write the files of ``job/schemas``."""
    SCHEMA_FOLDER.mkdir(exist_ok=True)
    for name, schema in all_schemas().items():
        (SCHEMA_FOLDER / name).write_text(schema_text(schema), "utf-8")


if __name__ == "__main__":
    main()
