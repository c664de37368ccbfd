"""Kept channels of a layer, as indices. Successive cuts compose."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from job.errors import DataError

if TYPE_CHECKING:
    from job.files import JsonObject

Kept = tuple[int, ...]
Scaled = tuple[tuple[Kept, int, int], ...]
AttributeSizes = tuple[tuple[str, int | tuple[int, ...]], ...]
MAX_AXES = 16
SIDES = {"out": "out", "in": "in_", "select": "select", "places": "places"}


@dataclass(frozen=True)
class LayerChannels:
    """Indices of the kept channels on each side of a layer; None keeps all of them.

    ``out`` are its outputs and ``in_`` its inputs; a BatchNorm has only ``out``. ``select`` are the
    channels that a BatchNorm selects from an input that is not cut. With ``bias`` the layer gets a
    bias, for the constant of removed channels. A layer without any input is a constant, into which
    the BatchNorm ``norm`` after it is folded. ``axis`` is the axis of the outputs or channels in a
    parameter outside known layers; None for the first axis longer than 1. ``sizes`` are attributes
    of a module, by name, that count channels. ``scaled`` are outputs after the cut, with two
    numbers of channels m and n: their weights are multiplied by sqrt(m / n). ``places`` are the
    kept channels of a table of indices, or of the ``line`` of channels along the ``axis`` of a
    convolution across channels.
    """

    out: Kept | None = None
    in_: Kept | None = None
    select: Kept | None = None
    bias: bool = False
    norm: str | None = None
    axis: int | None = None
    sizes: AttributeSizes = ()
    scaled: Scaled = ()
    places: Kept | None = None
    line: int | None = None

    @property
    def cuts_tensors(self) -> bool:
        """Whether a side is cut, and not attributes alone."""
        return any(getattr(self, name) is not None for name in SIDES.values())

    @property
    def is_constant(self) -> bool:
        """Whether the layer has outputs and no input."""
        return self.in_ == () and self.out != ()

    def after(self, later: LayerChannels) -> LayerChannels:
        """Return the indices that are kept after this cut and a ``later`` one of its result."""
        return LayerChannels(
            _chain(self.out, later.out),
            _chain(self.in_, later.in_),
            _chain(self.select, later.select),
            self.bias or later.bias,
            later.norm or self.norm,
            self.axis if later.axis is None else later.axis,
            tuple((dict(self.sizes) | dict(later.sizes)).items()),
            (*_cut_rows(self.scaled, later.out), *later.scaled),
            _chain(self.places, later.places),
            later.line if self.line is None else self.line,
        )

    def to_dict(self) -> JsonObject:
        """Return the record stored in model.json."""
        sides = {side: getattr(self, name) for side, name in SIDES.items()}
        record: JsonObject = {side: list(kept) for side, kept in sides.items() if kept}
        record |= {"bias": True} if self.bias else {}
        empty = [side for side, kept in sides.items() if kept == ()]
        record |= {"empty": empty} if empty else {}
        record |= {} if self.axis is None else {"axis": self.axis}
        record |= {} if self.line is None else {"line": self.line}
        sizes_record = {n: v if isinstance(v, int) else list(v) for n, v in self.sizes}
        record |= {"sizes": sizes_record} if sizes_record else {}
        record |= {"scaled": [[list(r), n, d] for r, n, d in self.scaled]} if self.scaled else {}
        return record | ({"norm": self.norm} if self.norm else {})

    @classmethod
    def from_dict(cls, values: object) -> LayerChannels:
        """Read the record of model.json; raises DataError."""
        error = DataError("a layer's kept channels are not lists of rising indices")
        if not isinstance(values, dict) or type(values.get("bias", False)) is not bool:
            raise error
        norm, empty, axis = values.get("norm"), values.get("empty", []), values.get("axis")
        if not isinstance(norm, str | None) or not isinstance(empty, list):
            raise error
        if axis is not None and (type(axis) is not int or not 0 <= axis < MAX_AXES):
            raise DataError("the axis of a parameter's kept channels is not a small number")
        line = values.get("line")
        if line is not None and (type(line) is not int or line < 1):
            raise DataError("the line of channels of a convolution is not a number")
        kept: dict[str, Kept | None] = {}
        for side, name in SIDES.items():
            indices = values.get(side)
            if not (indices is None or _are_rising(indices)):
                raise error
            kept[name] = None if indices is None else tuple(indices)
        for side in empty:
            if side not in list(SIDES) or kept[SIDES[side]] is not None:
                raise DataError(f"a layer keeps none and some of its channels on the side {side!r}")
            kept[SIDES[side]] = ()
        bias = values.get("bias", False)
        sizes = _read_sizes(values.get("sizes", {}))
        sides = kept["out"], kept["in_"], kept["select"]
        scaled = _read_scaled(values.get("scaled", []))
        return cls(*sides, bias, norm, axis, sizes, scaled, kept["places"], line)


def _read_sizes(values: object) -> AttributeSizes:
    """Read attributes and their values from model.json; raises DataError."""
    error = DataError("the sizes of a module are not numbers by the name of an attribute")
    if not isinstance(values, dict):
        raise error
    sizes: list[tuple[str, int | tuple[int, ...]]] = []
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if not name.isidentifier() or any(type(n) is not int or n < 0 for n in numbers):
            raise error
        sizes.append((name, tuple(numbers) if isinstance(value, list) else numbers[0]))
    return tuple(sizes)


def _cut_rows(scaled: Scaled, kept: Kept | None) -> Scaled:
    """Return scaled outputs after another cut, which keeps the outputs ``kept``."""
    if kept is None:
        return scaled
    return tuple(
        (tuple(place for place, row in enumerate(kept) if row in rows), over, under)
        for indices, over, under in scaled
        for rows in (set(indices),)
    )


def _read_scaled(values: object) -> Scaled:
    """Read scaled outputs from model.json; raises DataError."""
    scaled = []
    for value in values if isinstance(values, list) else [None]:
        if not isinstance(value, list) or len(value) != 3 or not _are_rising(value[0]):
            raise DataError("the scaled outputs of a layer are not indices and two numbers")
        if any(type(number) is not int or number < 1 for number in value[1:]):
            raise DataError("the scale of a layer's outputs is not a fraction of two numbers")
        scaled.append((tuple(value[0]), value[1], value[2]))
    return tuple(scaled)


def _are_rising(kept: object) -> bool:
    return (
        isinstance(kept, list)
        and bool(kept)
        and all(type(i) is int and 0 <= i < 2**31 for i in kept)
        and all(before < i for before, i in pairwise(kept))
    )


Layers = dict[str, LayerChannels]


def removed_layers(layers: Layers) -> list[str]:
    """Return the names of the layers that were removed: without outputs, or constant."""
    return [n for n, kept in layers.items() if kept.out == () or kept.is_constant]


def compose(first: Layers, then: Layers) -> Layers:
    """Return two successive cuts as one cut of the network before the first."""
    whole = LayerChannels()
    return {
        name: first.get(name, whole).after(then.get(name, whole))
        for name in dict.fromkeys([*first, *then])
    }


def _chain(first: Kept | None, then: Kept | None) -> Kept | None:
    if first is None or then is None:
        return then if first is None else first
    return tuple(first[i] for i in then)
