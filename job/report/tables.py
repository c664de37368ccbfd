"""Tables and lines about a run, for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from job.artifacts.json_records import to_json
from job.artifacts.records import PlannedRound
from job.console import table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from job.slimming.planning.cost import LayerCost
    from job.training.epoch import EpochResult


def epoch_line(width: float, epoch: EpochResult) -> str:
    """Return the line of an epoch, in the form that users of the homework know."""
    return (
        f"rate {width:6.4f} epoch {epoch.epoch:>3d}: "
        f"train loss: {epoch.train_loss:6.4f}, acc {epoch.train_acc:6.4f} "
        f"valid loss: {epoch.valid_loss:6.4f}, acc {epoch.valid_acc:6.4f}"
    )


def rounds_table(rounds: Sequence[PlannedRound | Mapping[str, Any]]) -> str:
    """Return a line per round: width and costs, and after training the accuracies."""
    entries = [to_json(entry) if isinstance(entry, PlannedRound) else entry for entry in rounds]
    scores = {"acc after cut": "valid_acc_pruned", "acc tuned": "valid_acc"}
    if not any("valid_acc" in entry for entry in entries):
        scores = {}  # a plan
    header = ("round", "width", "channels", "params", "MACs", "bytes", *scores)
    rows = [
        (
            "base" if entry["round"] == 0 else str(entry["round"]),
            f"{entry['width']:.4f}",
            *(f"{entry[cost]:,}" for cost in ("channels", "params", "macs", "bytes")),
            *(_accuracy(entry.get(key)) for key in scores.values()),
        )
        for entry in entries
    ]
    return table(header, rows)


def layers_table(layers: Sequence[LayerCost]) -> str:
    """Return a line per layer: its channels and costs."""
    header = ("layer", "kind", "in", "out", "params", "MACs")
    return table(
        header,
        [
            (row.name, row.kind, *(f"{n:,}" for n in (row.channels_in, row.channels_out)),
             f"{row.params:,}", f"{row.macs:,}")
            for row in layers
        ],
        left=2,
    )  # fmt: skip


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
