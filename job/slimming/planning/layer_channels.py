"""The channels that a layer keeps, as indices. Successive cuts compose."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from job.errors import DataError

Kept = tuple[int, ...]
SIDES = {"out": "out", "in": "in_", "select": "select"}


@dataclass(frozen=True)
class LayerChannels:
    """The indices that are kept on each side of a layer; None keeps all of them.

    ``out`` are its outputs and ``in_`` its inputs; a BatchNorm has only ``out``. ``select`` are the
    channels that a BatchNorm selects from an input that is not cut. With ``bias`` the layer gets a
    bias, which holds the constant that removed channels added.
    """

    out: Kept | None = None
    in_: Kept | None = None
    select: Kept | None = None
    bias: bool = False

    def after(self, later: LayerChannels) -> LayerChannels:
        """Return the indices that are kept after this cut and a ``later`` one of its result."""
        return LayerChannels(
            _chain(self.out, later.out),
            _chain(self.in_, later.in_),
            _chain(self.select, later.select),
            self.bias or later.bias,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record stored in model.json."""
        sides = {side: getattr(self, name) for side, name in SIDES.items()}
        record: dict[str, Any] = {side: list(kept) for side, kept in sides.items() if kept}
        return record | ({"bias": True} if self.bias else {})

    @classmethod
    def from_dict(cls, values: Any) -> LayerChannels:
        """Read the record of model.json; raises DataError."""
        if not isinstance(values, dict) or type(values.get("bias", False)) is not bool:
            raise DataError("a layer's kept channels are not lists of rising indices")
        sides = {name: values.get(side) for side, name in SIDES.items()}
        for kept in sides.values():
            if kept is not None and not (
                isinstance(kept, list)
                and kept
                and all(type(i) is int and 0 <= i < 2**31 for i in kept)
                and all(before < i for before, i in pairwise(kept))
            ):
                raise DataError("a layer's kept channels are not lists of rising indices")
        indices = {name: None if kept is None else tuple(kept) for name, kept in sides.items()}
        return cls(**indices, bias=values.get("bias", False))


Layers = dict[str, LayerChannels]


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
