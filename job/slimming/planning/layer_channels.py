"""The channels of a layer that a cut keeps, as indices; cuts one after the other compose."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from job.errors import DataError

Kept = tuple[int, ...]
SIDES = {"out": "out", "in": "in_", "select": "select"}


@dataclass(frozen=True)
class LayerChannels:
    """Indices that stay on a layer's sides; None: all of them.

    A BatchNorm has but ``out``; both sides of a depthwise convolution are the same, or multiples.
    ``select``: what a BatchNorm takes of its input, which stays whole. ``bias``: the layer gets
    one, to hold what removed channels used to add.
    """

    out: Kept | None = None
    in_: Kept | None = None
    select: Kept | None = None
    bias: bool = False

    def after(self, later: LayerChannels) -> LayerChannels:
        """The indices, into what this one started from, that stay when ``later`` is cut too."""
        return LayerChannels(
            _chain(self.out, later.out),
            _chain(self.in_, later.in_),
            _chain(self.select, later.select),
            self.bias or later.bias,
        )

    def to_dict(self) -> dict[str, Any]:
        """As stored in model.json."""
        sides = {side: getattr(self, name) for side, name in SIDES.items()}
        found: dict[str, Any] = {side: list(kept) for side, kept in sides.items() if kept}
        return found | ({"bias": True} if self.bias else {})

    @classmethod
    def from_dict(cls, values: Any) -> LayerChannels:
        """Read back what ``to_dict`` gave; raises DataError."""
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
        chosen = {name: None if kept is None else tuple(kept) for name, kept in sides.items()}
        return cls(**chosen, bias=values.get("bias", False))


Layers = dict[str, LayerChannels]


def compose(first: Layers, then: Layers) -> Layers:
    """The layers of two cuts, one after the other, as one cut of what the first started from."""
    whole = LayerChannels()
    return {
        name: first.get(name, whole).after(then.get(name, whole))
        for name in dict.fromkeys([*first, *then])
    }


def _chain(first: Kept | None, then: Kept | None) -> Kept | None:
    if first is None or then is None:
        return then if first is None else first
    return tuple(first[i] for i in then)
