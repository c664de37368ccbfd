"""What a person sees: plain lines, progress bars on a terminal, the table of rounds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from job.slimming.cost import LayerCost
    from job.training.fit import EpochResult


def _is_main() -> bool:
    """Whether this process speaks: a command that is alone loads no torch to know that."""
    processes = sys.modules.get("job.processes")
    return processes is None or bool(processes.is_main())


def say(text: str) -> None:
    """Print a line, on the main process only."""
    if _is_main():
        click.echo(text)


def progress(label: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A bar over (items, count) that vanishes when done; nothing in a log or on other ranks."""

    def bar(items: Iterable[Any], count: int) -> Iterator[Any]:
        if not (_is_main() and sys.stderr.isatty()):
            yield from items
            return
        with click.progressbar(items, length=count, label=label, file=sys.stderr) as shown:
            yield from shown
        click.echo("\033[A\033[2K", nl=False, err=True)

    return bar


def epoch_line(width: float, epoch: EpochResult) -> str:
    """The line that users of the homework know."""
    return (
        f"rate {width:6.4f} epoch {epoch.epoch:>3d}: "
        f"train loss: {epoch.train_loss:6.4f}, acc {epoch.train_acc:6.4f} "
        f"valid loss: {epoch.valid_loss:6.4f}, acc {epoch.valid_acc:6.4f}"
    )


def rounds_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """One line a round: width, cost, accuracy after surgery and after fine-tuning."""
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


def layers_table(rows: Sequence[LayerCost]) -> str:
    """One line a layer."""
    header = ("layer", "kind", "in", "out", "params", "MACs")
    return table(
        header,
        [
            (row.name, row.kind, *(f"{n:,}" for n in (row.channels_in, row.channels_out)),
             f"{row.params:,}", f"{row.macs:,}")
            for row in rows
        ],
        left=2,
    )  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns under their headings, the first ``left`` flush left, numbers flush right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
