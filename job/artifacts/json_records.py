"""Conversion of frozen dataclasses to and from JSON, for all records of a run directory.

The keys are the field names, in order, without the trailing underscore of a name that would be a
Python keyword. Metadata ``{"key": ...}`` sets another key; ``{metric}`` in it stands for the field
``metric`` of the record, as in ``valid_{metric}``. A field is omitted if it has its default value,
unless the class sets ``WRITE_DEFAULTS``; metadata ``{"brief": True}`` omits it even then. Unknown
keys are ignored, so that newer files can be read.

A class with ``to_dict`` and ``from_dict`` defines its own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from job.training.epoch import ACCURACY

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from job.files import JsonObject

R = TypeVar("R", bound="DataclassInstance")


def to_json(record: DataclassInstance, *, everything: bool = False) -> JsonObject:
    """Return ``record`` as a new dict of plain values, for JSON.

    With ``everything``, fields that have their default value are written too.
    """
    content: JsonObject = {}
    everything = everything or getattr(record, "WRITE_DEFAULTS", False)
    metric = getattr(record, "metric", ACCURACY)
    for field in fields(record):
        value = getattr(record, field.name)
        written = everything and not field.metadata.get("brief")
        if written or value != _default_of(field):
            content[_key(field, metric)] = _plain(value)
    return content


def from_json(kind: type[R], content: object, *, lenient: bool = False) -> R:
    """Build a ``kind`` from the dict that ``to_json`` of this or an earlier version returned.

    Raises ValueError for a missing key or a value of another type. With ``lenient``, an invalid
    value of a field with a default counts as missing.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{_short(content)} is not a table of values")
    values, metric = {}, str(content.get("metric", ACCURACY))
    for field in fields(kind):
        key, hint = _key(field, metric), _hints(kind)[field.name]
        has_default = _default_of(field) is not MISSING
        if key not in content:
            if not has_default:
                raise ValueError(f"{key} is missing")
            continue
        try:
            values[field.name] = _typed(hint, content[key], lenient)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if not (lenient and has_default):
                raise ValueError(f"{key}: {error}") from error
    return kind(**values)


def _default_of(field: Field[Any]) -> Any:
    """Return the default of ``field``, or MISSING if it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _key(field: Field[Any], metric: str) -> str:
    key = str(field.metadata.get("key", field.name.removesuffix("_")))
    return key.replace("{metric}", metric)


@cache
def _hints(kind: type) -> dict[str, object]:
    return get_type_hints(kind)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "to_dict", None) if hasattr(value, "from_dict") else None
        return own() if own else to_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any, lenient: bool) -> Any:
    """Convert ``value`` to the type ``hint``; raises ValueError for another type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, UnionType):
        return _one_of(args, value, lenient)
    if origin is Literal and value in args:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        own = getattr(hint, "from_dict", None)
        return own(value) if own else from_json(hint, value, lenient=lenient)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(args[0], item, lenient) for item in value)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {str(key): _typed(args[1], item, lenient) for key, item in value.items()}
    if hint is float and type(value) is int:
        return value
    if type(value) is not hint:
        raise ValueError(f"{_short(value)} is not {getattr(hint, '__name__', hint)}")
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, lenient: bool) -> Any:
    """Convert ``value`` to ``T | None``."""
    if value is None and NoneType in kinds:
        return None
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    return _typed(kind, value, lenient)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
