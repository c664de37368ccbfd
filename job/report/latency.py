"""Tables of measured latency, and sentences about what became faster and what did not."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from job.console import counted, table
from job.files import shell_word
from job.slimming.latency.explanation import bottlenecks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from job.artifacts.records import RoundRecord
    from job.slimming.latency.benchmark import (
        BenchmarkResult,
        Conditions,
        LayerComparison,
        Measurement,
    )
    from job.slimming.latency.explanation import LayerChange
    from job.slimming.planning.cost import Cost

MAX_LAYER_ROWS = 12  # rows of a table of layers; the last row is the sum of all others
MAX_DRIFT = 0.1  # relative; a larger drift is reported
MAX_OUTLIERS = 0.05  # share of the calls; more outliers are reported
UNCERTAIN = 1.25  # ratio of the bounds of a speed-up; a larger one is reported
EXPECTED_SPEEDUP = 0.75  # of the ratio of MACs; a smaller speed-up is explained


def benchmark_text(
    conditions: Conditions, costs: Mapping[str, Cost | None], result: BenchmarkResult
) -> str:
    """Return the conditions, and a table with its conclusions for each runtime and batch size."""
    parts = [_conditions_text(conditions)]
    for (runtime, size), group in groupby(
        result.measurements, key=lambda each: (each.runtime, each.batch_size)
    ):
        rows = list(group)
        parts.append(f"{runtime}, batch {size}\n{_latency_table(rows, costs)}")
        parts += ["\n".join(notes)] if (notes := list(_notes(rows))) else []
        compared = {c.network: c for c in result.comparisons if c.batch_size == size}
        for row in rows[1:]:
            comparison = compared.get(row.network)
            if row.speedup:
                parts.append(_verdict(row, rows[0], costs, comparison))
            if comparison and runtime == "eager":
                parts.append(_layers_table(comparison))
    parts += [f"not measured: {reason}" for reason in result.not_measured]
    return "\n\n".join(parts)


def _conditions_text(conditions: Conditions) -> str:
    text = (
        f"{conditions.device_name}, {counted(conditions.threads, 'thread')}, "
        f"{conditions.precision}, {conditions.memory_format}, "
        f"torch {conditions.versions['torch']}"
    )
    return text if conditions.device == "cuda" else f"{text}; not measured on a GPU"


def milliseconds(seconds: float) -> str:
    """Return a time with three significant digits, in milliseconds."""
    number = seconds * 1000
    return f"{number:.0f} ms" if number >= 100 else f"{number:.3g} ms"


def _latency_table(rows: Sequence[Measurement], costs: Mapping[str, Cost | None]) -> str:
    header = ("network", "median", "p90", "p99", "images/s", "speed-up", "MACs", "params")
    base = costs.get(rows[0].network)
    return table(header, [(*_times(row), *_ratios(base, costs.get(row.network))) for row in rows])


def _times(row: Measurement) -> tuple[str, ...]:
    times = row.latency.median, row.latency.p90, row.latency.p99
    gain = f"{row.speedup.value:.2f}x" if row.speedup else ""
    return (
        row.network, *map(milliseconds, times), f"{row.latency.images_per_second:,.4g}", gain
    )  # fmt: skip


def _ratios(base: Cost | None, cost: Cost | None) -> tuple[str, str]:
    """Return the ratios of multiply-adds and of parameters of the reference to a network's."""
    if base is None or cost is None or base is cost:
        return "", ""
    pairs = (base.macs, cost.macs), (base.params, cost.params)
    macs, params = (f"{whole / left:.2f}x" if left else "" for whole, left in pairs)
    return macs, params


def latency_cautions(rounds: Sequence[RoundRecord], place: str) -> list[str]:
    """Return a caution if speed-ups of a run in ``place`` were measured on a busy machine."""
    wide = [e for e in rounds if (e.speedup_high or 0) > UNCERTAIN * (e.speedup_low or 0)]
    if not wide:
        return []
    texts = [f"round {e.round}: {e.speedup_low:.2f}x to {e.speedup_high:.2f}x" for e in wide]
    return [
        f"other programs used the machine while latencies were measured ({', '.join(texts)}): "
        f"gammaslim bench {shell_word(place)} measures them again"
    ]


def _notes(rows: Sequence[Measurement]) -> Iterator[str]:
    """Yield lines about a large drift and many outliers."""
    drifted = [row for row in rows if abs(row.latency.drift) > MAX_DRIFT]
    if drifted:
        most = max(drifted, key=lambda row: abs(row.latency.drift)).latency.drift
        yield (
            f"the machine became {abs(most):.0%} {'slower' if most > 0 else 'faster'} during the "
            "measurement; speed-ups are not affected, since they compare successive calls"
        )
    disturbed = [row for row in rows if row.latency.outliers > MAX_OUTLIERS * row.latency.samples]
    if disturbed:
        share = max(row.latency.outliers / row.latency.samples for row in disturbed)
        yield (
            f"up to {share:.0%} of the calls took much longer than the median: other programs use "
            "this machine"
        )


def _verdict(
    row: Measurement,
    reference: Measurement,
    costs: Mapping[str, Cost | None],
    comparison: LayerComparison | None,
) -> str:
    """Return whether a network is faster than the reference, and which layers limit it."""
    assert row.speedup
    base, cost = costs.get(reference.network), costs.get(row.network)
    fewer = base.macs / cost.macs if base and cost and cost.macs else None
    macs = "" if fewer is None else f", with {fewer:.2f}x fewer MACs"
    if not row.speedup.faster:
        word = "slower" if row.speedup.high < 1 else "not faster"
        text = f"{row.network} is {word} than {reference.network}: {row.speedup}{macs}"
    else:
        text = f"{row.network} is faster than {reference.network}: {row.speedup}{macs}"
        if fewer is None or row.speedup.value >= EXPECTED_SPEEDUP * fewer:
            return text
    layers = bottlenecks(comparison.layers) if comparison else []
    if not layers:
        return text
    where = "" if row.runtime == "eager" else ", timed in eager mode"
    return f"{text}\nlayers responsible{where}:\n" + "\n".join(f"  {layer}" for layer in layers)


def _layers_table(comparison: LayerComparison) -> str:
    """Return a table of the layers that take most of the time after the cut."""
    header = ("layer", "kind", "before", "after", "share before", "share after", "speed-up", "work")
    changes = sorted(comparison.layers, key=lambda change: -change.after)
    first = sorted(changes[:MAX_LAYER_ROWS], key=comparison.layers.index)
    rows = [
        (change.layer, change.kind, *_layer_times(change), _times_less(change.work))
        for change in first
    ]
    others = changes[MAX_LAYER_ROWS:]
    if others:
        sums = (sum(getattr(c, name) for c in others) for name in
                ("before", "after", "share_before", "share_after"))  # fmt: skip
        before, after, *shares = sums
        gain = f"{before / after:.2f}x" if after else ""
        rows.append(
            (f"{len(others)} others", "", milliseconds(before), milliseconds(after),
             *(f"{share:.1%}" for share in shares), gain, "")
        )  # fmt: skip
    title = f"layers of {comparison.network}, batch {comparison.batch_size}, eager"
    return f"{title}\n{table(header, rows, left=2)}"


def _layer_times(change: LayerChange) -> tuple[str, ...]:
    gain = f"{change.before / change.after:.2f}x" if change.after and change.before else ""
    return (
        milliseconds(change.before), milliseconds(change.after),
        f"{change.share_before:.1%}", f"{change.share_after:.1%}", gain,
    )  # fmt: skip


def _times_less(work: float | None) -> str:
    return f"{1 / work:.2f}x less" if work else ""
