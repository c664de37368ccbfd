"""Sensitivity of a network: a record with a row for each channel group.

Its fields are the keys of ``--json`` and of sensitivity.json of a round. This module does not
import torch.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

from job.console import counted, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.files import JsonObject

LOSS_NAMES = {
    "kl": "KL divergence of the softmax, in nats",
    "squared_error": "squared error, relative to the squares of the outputs",
}


@dataclass(frozen=True)
class LossPoint:
    """Loss of the outputs when a group alone keeps its ``channels`` most important channels.

    ``fraction`` is the requested fraction of the channels. ``loss`` is None if it is not finite or
    was not measured.
    """

    fraction: float
    channels: int
    loss: float | None


@dataclass(frozen=True)
class GroupSensitivity:
    """Sensitivity of a channel group: its cost, and the loss without some of its channels.

    ``macs`` and ``params`` are the fractions of the network's costs that are saved without the
    group. ``kept`` is the number of channels that a cut keeps; None without a cut.
    """

    WRITE_DEFAULTS: ClassVar[bool] = True

    group: str
    channels: int
    macs: float
    params: float
    points: tuple[LossPoint, ...]
    kept: int | None = None

    def loss_at(self, fraction: float) -> float | None:
        """Return the loss with ``fraction`` of the channels kept, or None if it is unknown."""
        return next((p.loss for p in self.points if p.fraction == fraction), None)


@dataclass(frozen=True)
class UncutChannels:
    """Channels of a layer or group that are not cut or not measured, and the reason."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Sensitivity:
    """Losses of a network's outputs when each channel group alone is reduced.

    ``print(sensitivity)`` shows a table.

    Attributes:
        loss: a key of ``LOSS_NAMES``; empty if nothing was measured
        images: number of calibration images that the losses are means over
        fractions: kept fractions of a group's channels, falling
        target: METRIC=VALUE of the cut that ``kept`` belongs to, if one was given
        rows: the channel groups in the order of the data flow
        blocked: channels that are not cut or not measured, and why
    """

    WRITE_DEFAULTS: ClassVar[bool] = True

    loss: str
    images: int
    fractions: tuple[float, ...]
    target: str | None
    rows: tuple[GroupSensitivity, ...] = field(metadata={"key": "groups"})
    blocked: tuple[UncutChannels, ...] = ()

    def to_dict(self) -> JsonObject:
        """Return plain values for JSON; the key of ``rows`` is ``groups``."""
        return {
            "loss": self.loss,
            "images": self.images,
            "fractions": list(self.fractions),
            "target": self.target,
            "groups": [{**asdict(r), "points": [asdict(p) for p in r.points]} for r in self.rows],
            "blocked": [asdict(each) for each in self.blocked],
        }

    def to_csv(self) -> str:
        """Return CSV text with a line for each group; unknown losses are empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        losses = (f"loss_{percent(fraction)}" for fraction in self.fractions)
        kept = ("kept",) if self.has_kept else ()
        writer.writerow(("group", "channels", "macs", "params", *losses, *kept))
        writer.writerows(self.values())
        return text.getvalue()

    def values(self) -> Iterator[tuple[str | float | None, ...]]:
        """Yield the values of each row; unknown losses are None."""
        for row in self.rows:
            losses = (row.loss_at(fraction) for fraction in self.fractions)
            kept = (row.kept,) if self.has_kept else ()
            yield (row.group, row.channels, row.macs, row.params, *losses, *kept)

    @property
    def has_kept(self) -> bool:
        """Whether the rows contain the number of channels that a cut keeps."""
        return any(row.kept is not None for row in self.rows)

    def header(self) -> tuple[str, ...]:
        """Return the column headings of ``cells``."""
        losses = (f"{percent(fraction)} %" for fraction in self.fractions)
        kept = (f"at {self.target}" if self.target else "kept",) if self.has_kept else ()
        return "group", "channels", "MACs", "params", *losses, *kept

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Yield the cells of each row, as text."""
        for row in self.rows:
            losses = (row.loss_at(fraction) for fraction in self.fractions)
            kept = ("" if row.kept is None else f"{row.kept:,}",) if self.has_kept else ()
            yield (
                row.group, f"{row.channels:,}", f"{row.macs:.1%}", f"{row.params:.1%}",
                *("" if loss is None else f"{loss:.3g}" for loss in losses), *kept,
            )  # fmt: skip

    def describe(self) -> str:
        """Describe the loss and the number of images that it was measured on."""
        name = LOSS_NAMES.get(self.loss)
        if not name:
            return "no loss was measured: no channel group can be cut"
        return f"loss of the outputs ({name}) on {counted(self.images, 'image')}"

    def __str__(self) -> str:
        lines = [
            f"{self.describe()}\nwhen one group alone keeps a percentage of its channels; MACs and "
            "params: the share\nthat is saved without the group",
            table(self.header(), self.cells()),
        ]
        if self.blocked:
            blocked = [(b.layer, f"{b.channels:,}", b.reason) for b in self.blocked]
            lines.append(
                "channels that are not cut\n" + table(("layer", "channels", "why"), blocked, left=3)
            )
        return "\n\n".join(lines)


def percent(fraction: float) -> str:
    """Format a fraction in percent, without the percent sign: 90, 12.5."""
    return f"{100 * fraction:g}"
