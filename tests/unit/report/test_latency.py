"""What ``bench`` says about its measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from job.report.latency import benchmark_text, milliseconds
from job.slimming.latency.benchmark import BenchmarkResult, Conditions, LayerComparison, Measurement
from job.slimming.latency.explanation import LayerChange
from job.slimming.latency.statistics import Latency, Speedup
from job.slimming.planning.cost import Cost

CONDITIONS = Conditions(
    "cpu", "Some CPU", 1, "fp32", "contiguous", (1,), 2.0, "2026-01-01", {"torch": "2"}
)
COSTS = {"wide": Cost(8, 2000, 4000, 1), "slim": Cost(4, 1000, 1000, 1)}
LAYERS = (
    LayerChange("stem", "Conv2d", 0.001, 0.0009, 0.1, 0.1, 0.9),
    LayerChange("deep", "Conv2d", 0.009, 0.0085, 0.9, 0.9, 0.25),
)


def text(gain: Speedup, *, outliers: int = 0, drift: float = 0.0, device: str = "cpu") -> str:
    latency = Latency(0.010, 0.011, 0.012, 100.0, 50, outliers, drift)
    rows = (
        Measurement("eager", 1, "wide", latency, None),
        Measurement("eager", 1, "slim", latency, gain),
    )
    compared = (LayerComparison(1, "slim", LAYERS),)
    return benchmark_text(
        replace(CONDITIONS, device=device), COSTS, BenchmarkResult(rows, compared, ())
    )


def test_a_network_that_is_not_faster_is_reported_with_the_layers_responsible() -> None:
    shown = text(Speedup(1.01, 0.99, 1.03))
    assert "slim is not faster than wide: 1.01x (0.99 to 1.03), with 4.00x fewer MACs" in shown
    assert "layers responsible:\n  deep (Conv2d, 90% of the time: 1.06x for 4.00x less" in shown
    assert "slim is slower than wide" in text(Speedup(0.8, 0.7, 0.9))


def test_a_gain_below_that_of_the_multiply_adds_is_explained_too() -> None:
    assert "slim is faster than wide: 2.00x" in text(Speedup(2.0, 1.9, 2.1))
    assert "layers responsible" in text(Speedup(2.0, 1.9, 2.1))
    assert "layers responsible" not in text(Speedup(3.9, 3.8, 4.0))


def test_the_table_has_the_ratios_of_costs_next_to_the_speed_up() -> None:
    row = next(line for line in text(Speedup(2.0, 1.9, 2.1)).splitlines() if line[:4] == "slim")
    assert row.split()[-3:] == ["2.00x", "4.00x", "2.00x"]


def test_drift_and_other_programs_are_reported() -> None:
    assert "the machine became 20% slower during" in text(Speedup(1, 1, 1), drift=0.2)
    assert "up to 20% of the calls took much longer" in text(Speedup(1, 1, 1), outliers=10)
    assert "during" not in text(Speedup(1, 1, 1), drift=0.05)


def test_a_result_of_a_cpu_says_that_no_gpu_was_measured() -> None:
    assert "not measured on a GPU" in text(Speedup(1, 1, 1))
    assert "not measured on a GPU" not in text(Speedup(1, 1, 1), device="cuda")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1.5, "1500 ms"),
        (0.123, "123 ms"),
        (0.01, "10 ms"),
        (0.00123, "1.23 ms"),
        (5e-6, "0.005 ms"),
    ],
)
def test_milliseconds_have_three_digits(seconds: float, shown: str) -> None:
    assert milliseconds(seconds) == shown
