"""Sensitivity of a network: a row for each channel group, to print, to write and to read again.

The fields are the keys of ``--json`` and of a round's sensitivity.json. Needs no torch.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from job.console import counted, table

if TYPE_CHECKING:
    from collections.abc import Iterator

LOSS_NAMES = {
    "kl": "KL divergence of the softmax, in nats",
    "squared_error": "squared error, relative to the squares of the outputs",
}


@dataclass(frozen=True)
class LossPoint:
    """The ``loss`` of the outputs when a group alone keeps ``channels``, by importance.

    ``fraction`` is the share of the channels that was asked for. A loss that is not finite, or was
    not measured, is None.
    """

    fraction: float
    channels: int
    loss: float | None


@dataclass(frozen=True)
class GroupSensitivity:
    """A channel group: what it costs, and what the outputs lose without some of its channels.

    ``macs`` and ``params`` are the shares of the network's that are saved when the group has no
    channels. ``kept`` is the number of channels that a cut keeps; None without one.
    """

    WRITE_DEFAULTS: ClassVar[bool] = True

    group: str
    channels: int
    macs: float
    params: float
    points: tuple[LossPoint, ...]
    kept: int | None = None

    def loss_at(self, fraction: float) -> float | None:
        """Return the loss with ``fraction`` of the channels kept; None where it is unknown."""
        return next((p.loss for p in self.points if p.fraction == fraction), None)


@dataclass(frozen=True)
class UncutChannels:
    """Channels of a layer or group that are not cut or not measured, and the reason."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Sensitivity:
    """What the outputs of a network lose when each channel group alone is reduced.

    ``print(sensitivity)`` shows a table.

    Attributes:
        loss: a key of ``LOSS_NAMES``; empty if nothing was measured
        images: number of calibration images that the losses are means over
        fractions: shares of a group's channels that are kept, falling
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the rows have the key ``groups``."""
        return {
            "loss": self.loss,
            "images": self.images,
            "fractions": list(self.fractions),
            "target": self.target,
            "groups": [{**asdict(r), "points": [asdict(p) for p in r.points]} for r in self.rows],
            "blocked": [asdict(each) for each in self.blocked],
        }

    def to_csv(self) -> str:
        """Return a line for each group; losses that are unknown are empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        losses = (f"loss_{percent(fraction)}" for fraction in self.fractions)
        has_kept = self.has_kept
        writer.writerow(
            ("group", "channels", "macs", "params", *losses, *(("kept",) if has_kept else ()))
        )
        for row in self.rows:
            values = (row.loss_at(fraction) for fraction in self.fractions)
            kept = (row.kept,) if has_kept else ()
            writer.writerow((row.group, row.channels, row.macs, row.params, *values, *kept))
        return text.getvalue()

    @property
    def has_kept(self) -> bool:
        """Whether a cut says how many channels it keeps."""
        return any(row.kept is not None for row in self.rows)

    def header(self) -> tuple[str, ...]:
        """Return the headings of ``cells``."""
        losses = (f"{percent(fraction)} %" for fraction in self.fractions)
        kept = (f"at {self.target}" if self.target else "kept",) if self.has_kept else ()
        return "group", "channels", "MACs", "params", *losses, *kept

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Yield the texts of each row."""
        for row in self.rows:
            losses = (row.loss_at(fraction) for fraction in self.fractions)
            kept = ("" if row.kept is None else f"{row.kept:,}",) if self.has_kept else ()
            yield (
                row.group, f"{row.channels:,}", f"{row.macs:.1%}", f"{row.params:.1%}",
                *("" if loss is None else f"{loss:.3g}" for loss in losses), *kept,
            )  # fmt: skip

    def describe(self) -> str:
        """Return what the losses are, and how many images they were measured on."""
        name = LOSS_NAMES.get(self.loss)
        if not name:
            return "no loss was measured: no channel group can be cut"
        return f"loss of the outputs ({name}) on {counted(self.images, 'image')}"

    def __str__(self) -> str:
        lines = [
            f"{self.describe()}\nwith a percentage of the channels of one group alone; MACs and "
            "params: what the network saves\nwithout the group",
            table(self.header(), self.cells()),
        ]
        if self.blocked:
            blocked = [(b.layer, f"{b.channels:,}", b.reason) for b in self.blocked]
            lines.append(
                "channels that are not cut\n" + table(("layer", "channels", "why"), blocked, left=3)
            )
        return "\n\n".join(lines)


def percent(fraction: float) -> str:
    """Return a fraction in percent without its sign: 90, 12.5."""
    return f"{100 * fraction:g}"
