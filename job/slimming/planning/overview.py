"""A plan as text: what ``print(plan)`` shows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from job.console import table
from job.slimming.planning.plan import LayerChannels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.slimming.planning.plan import Plan, Sizes

MOST_LAYERS = 24  # shown; of more the first and the last ones
MOST_REASONS = 4
LONGEST = 60  # characters of a layer's name or of a reason


def plan_text(plan: Plan) -> str:
    """The layers and costs before and after, and what was left alone; at most 40 lines."""
    half = MOST_LAYERS // 2
    rows = [(_short(layer), *_sides(plan, layer, sizes)) for layer, sizes in plan.sizes.items()]
    if len(rows) > MOST_LAYERS:
        left_out = len(rows) - 2 * half + 1
        rows[half : len(rows) - half + 1] = [(f"… {left_out} more layers …", "", "")]
    parts = [f"{plan!r}"]
    if rows:
        parts.append(table(("layer", "inputs", "outputs"), rows))
    if plan.before and plan.after:
        after = plan.after.to_dict()
        costs = [
            (name, f"{old:,}", f"{after[name]:,}", f"{after[name] / old:.1%}" if old else "")
            for name, old in plan.before.to_dict().items()
        ]
        parts.append(table(("", "before", "after", "left"), costs))
    parts += ["\n".join(_blocked(plan))] if plan.blocked else []
    return "\n".join(parts)


def _sides(plan: Plan, layer: str, sizes: Sizes) -> tuple[str, str]:
    """Inputs and outputs, as ``64 -> 32`` where some of them go."""
    kept = plan.layers.get(layer, LayerChannels())
    now = kept.select or kept.in_, kept.out
    inputs, outputs = (
        "" if full is None else f"{full:,} -> {len(some):,}" if some else f"{full:,}"
        for full, some in zip(sizes, now, strict=True)
    )
    return inputs, outputs


def _blocked(plan: Plan) -> Iterator[str]:
    reasons: Counter[str] = Counter()
    for blocked in plan.blocked:
        reasons[blocked.reason] += blocked.channels
    for reason, channels in reasons.most_common(MOST_REASONS):
        yield f"not cut: {channels:,} channels: {_short(reason)}"
    if len(reasons) > MOST_REASONS:
        yield f"not cut: {len(reasons) - MOST_REASONS} more reasons, in plan.blocked"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:28]} … {text[-28:]}"
