"""Overview of a plan: the text that ``print(plan)`` shows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from job.console import counted, table
from job.slimming.graph.reasons import explain
from job.slimming.planning.layer_channels import LayerChannels, removed_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from job.slimming.graph.groups import BlockedChannels
    from job.slimming.planning.cost import Cost
    from job.slimming.planning.layer_channels import Layers

Sizes = tuple[int | None, int | None]  # inputs and outputs of a layer
MAX_LAYERS = 24  # rows of layers; of more layers, the first and the last ones are shown
MAX_REASONS = 4
MAX_CHARACTERS = 60  # of a layer's name or of a reason


def plan_text(
    title: str,
    sizes: Mapping[str, Sizes],
    layers: Layers,
    before: Cost | None,
    after: Cost | None,
    blocked: Sequence[BlockedChannels],
) -> str:
    """Return at most 40 lines: layers and costs before and after the cut, and blocked channels."""
    half = MAX_LAYERS // 2
    rows = [(_shortened(name), *_widths(layers, name, full)) for name, full in sizes.items()]
    if len(rows) > MAX_LAYERS:
        left_out = len(rows) - 2 * half + 1
        rows[half : len(rows) - half + 1] = [(f"… {left_out} more layers …", "", "")]
    parts = [title]
    if rows:
        parts.append(table(("layer", "inputs", "outputs"), rows))
    if before and after:
        parts.append(costs_table(before, after))
    return "\n".join([*parts, *removed_lines(layers), *_blocked_lines(blocked)])


def costs_table(before: Cost, after: Cost) -> str:
    """Return a table of the costs before and after a cut, and their ratios in percent."""
    costs = [
        (name, f"{old:,}", f"{new:,}", f"{new / old:.1%}" if old else "")
        for (name, old), new in zip(before.to_dict().items(), after.to_dict().values(), strict=True)
    ]
    return table(("", "before", "after", "left"), costs)


def removed_lines(layers: Layers) -> list[str]:
    """Return a line that names the layers that were removed whole; nothing where none was."""
    removed = removed_layers(layers)
    return [f"removed whole: {', '.join(map(_shortened, removed))}"] if removed else []


def _widths(layers: Layers, name: str, full: Sizes) -> tuple[str, str]:
    """Return the inputs and outputs of a layer as text, e.g. ``64 -> 32`` if some are cut."""
    kept = layers.get(name, LayerChannels())
    input_indices = kept.in_ if kept.select is None else kept.select
    inputs, outputs = (
        "" if size is None else f"{size:,}" if indices is None else f"{size:,} -> {len(indices):,}"
        for size, indices in zip(full, (input_indices, kept.out), strict=True)
    )
    return inputs, outputs


def _blocked_lines(blocked: Sequence[BlockedChannels]) -> Iterator[str]:
    reasons: Counter[str] = Counter()
    first = {each.reason: each for each in reversed(blocked)}
    for each in blocked:
        reasons[each.reason] += each.channels
    for reason, channels in reasons.most_common(MAX_REASONS):
        why = explain(_shortened(reason), first[reason].place, first[reason].remedy)
        yield f"not cut: {counted(channels, 'channel')}: {why}"
    if len(reasons) > MAX_REASONS:
        yield f"not cut: {len(reasons) - MAX_REASONS} more reasons, in plan.blocked"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:28]} … {text[-28:]}"
