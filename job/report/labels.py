"""Places for the names of points, next to the markers of a chart and not on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LETTER, HEIGHT = 6.6, 9  # pixels; mean width of a letter of a wide font, height of a letter
GAPS = (3, 10, 17)  # pixels between a point's marker and its name; the smallest that is free


@dataclass(frozen=True)
class Rectangle:
    """Rectangle in pixels, with y growing downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Rectangle) -> bool:
        """Return whether the rectangles have a common area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def is_inside(self, other: Rectangle) -> bool:
        """Return whether no part of it is outside of ``other``."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Label:
    """Name of a point: its box, and the anchor of its text."""

    text: str
    box: Rectangle
    anchor: Literal["start", "middle", "end"]

    @property
    def x(self) -> float:
        """Horizontal place of the anchor."""
        box = self.box
        middle = (box.left + box.right) / 2
        return {"start": box.left, "middle": middle, "end": box.right}[self.anchor]


def square(x: float, y: float, radius: float) -> Rectangle:
    """Return the box of a marker."""
    return Rectangle(x - radius, y - radius, x + radius, y + radius)


def place_label(
    text: str, marker: Rectangle, markers: list[Rectangle], labels: list[Label], frame: Rectangle
) -> Label | None:
    """Return the name of a point above, below, right or left of its ``marker``.

    It covers no marker if there is such a place in ``frame``, and never another name; None if only
    such places are left.
    """
    wide = LETTER * len(text)
    near = [box for box in markers if abs(box.left - marker.left) < wide + 3 * GAPS[-1]]
    free: list[Label] = []
    for gap in GAPS:
        for label in _around(text, marker, wide, gap):
            if label.box.is_inside(frame) and not any(label.box.overlaps(o.box) for o in labels):
                if not any(label.box.overlaps(box) for box in near):
                    return label
                free.append(label)
    return free[0] if free else None


def _around(text: str, marker: Rectangle, wide: float, gap: float) -> list[Label]:
    """Return the label at the four sides of a marker."""
    x, y = (marker.left + marker.right) / 2, (marker.top + marker.bottom) / 2
    above, below, half = marker.top - gap, marker.bottom + gap, HEIGHT / 2
    right, left = marker.right + gap, marker.left - gap
    return [
        Label(text, Rectangle(x - wide / 2, above - HEIGHT, x + wide / 2, above), "middle"),
        Label(text, Rectangle(x - wide / 2, below, x + wide / 2, below + HEIGHT), "middle"),
        Label(text, Rectangle(right, y - half, right + wide, y + half), "start"),
        Label(text, Rectangle(left - wide, y - half, left, y + half), "end"),
    ]
