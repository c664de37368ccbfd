"""Benchmark of networks on one device: latency by runtime and batch size, and layer times.

All networks are timed in turn in one process. The first network is the reference of speed-ups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from job.slimming.calibration.progress import no_progress
from job.slimming.latency.alternation import TimeLimits, time_alternately
from job.slimming.latency.clock import clock_of
from job.slimming.latency.explanation import LayerChange, compare_profiles
from job.slimming.latency.profile import profile_alternately, random_images
from job.slimming.latency.runtimes import (
    COMPILED,
    EAGER,
    ONNX,
    NotMeasured,
    Placement,
    compiled,
    eager,
    forget_compiled,
    onnx_call,
    onnx_session,
)
from job.slimming.latency.statistics import Latency, Speedup, latency_of, speedup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from job.slimming.calibration.progress import Progress
    from job.slimming.latency.clock import Clock
    from job.slimming.latency.runtimes import OnnxSession

LAYER_SHARE = 0.5  # seconds of the layer profile of a network, relative to a measurement


@dataclass(frozen=True, eq=False)
class Subject:
    """Network to measure on images of ``shape`` (C, H, W).

    ``macs`` has the multiply-adds of its layers, by name. ``onnx`` returns the content of its ONNX
    file, or raises NotMeasured. An ONNX file has no ``network``.
    """

    name: str
    shape: tuple[int, ...]
    network: nn.Module | None
    macs: Mapping[str, int]
    onnx: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class Measurement:
    """Latency of one network; ``speedup`` is relative to the reference, None for the reference."""

    runtime: str
    batch_size: int
    network: str
    latency: Latency
    speedup: Speedup | None


@dataclass(frozen=True)
class LayerComparison:
    """Comparison of the layers of one network with the layers of the reference, in eager mode."""

    batch_size: int
    network: str
    layers: tuple[LayerChange, ...]


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of a benchmark; ``not_measured`` has a sentence for each missing measurement."""

    measurements: tuple[Measurement, ...]
    comparisons: tuple[LayerComparison, ...]
    not_measured: tuple[str, ...]


@dataclass(frozen=True)
class Conditions:
    """Conditions of a benchmark; the fields are keys of ``bench --json``.

    ``seconds`` is the time of each measurement, ``time`` the date in ISO format, and ``versions``
    has the version of each package.
    """

    device: str
    device_name: str
    threads: int
    precision: str
    memory_format: str
    batch_sizes: tuple[int, ...]
    seconds: float
    time: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class BenchmarkPlan:
    """Plan of a benchmark. Other runtimes use ``threads`` threads, as torch does."""

    placement: Placement
    batch_sizes: tuple[int, ...]
    runtimes: tuple[str, ...]
    threads: int
    limits: TimeLimits = field(default_factory=TimeLimits)


def run_benchmark(
    subjects: Sequence[Subject],
    plan: BenchmarkPlan,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> BenchmarkResult:
    """Measure all ``subjects``. Moves their networks to the device, in place."""
    for subject in subjects:
        if subject.network is not None:
            plan.placement.put(subject.network.eval())
    run = _Benchmark(subjects, plan, clock or clock_of(plan.placement.device))
    places = [(runtime, size) for runtime in plan.runtimes for size in plan.batch_sizes]
    for number, (runtime, size) in enumerate(places, start=1):
        progress(f"{runtime}, batch {size}", number, len(places))
        run.measure(runtime, size)
        if runtime == EAGER:
            run.compare_layers(size)
    return BenchmarkResult(
        tuple(run.measurements), tuple(run.comparisons), tuple(dict.fromkeys(run.not_measured))
    )


class _Benchmark:
    """State of a benchmark in progress."""

    def __init__(self, subjects: Sequence[Subject], plan: BenchmarkPlan, clock: Clock) -> None:
        self.subjects, self.plan, self.clock = subjects, plan, clock
        self.measurements: list[Measurement] = []
        self.comparisons: list[LayerComparison] = []
        self.not_measured: list[str] = []
        self.sessions: dict[str, OnnxSession] = {}  # by the name of the network

    def measure(self, runtime: str, batch_size: int) -> None:
        """Time all networks that the runtime supports, in turn."""
        if runtime == COMPILED:
            forget_compiled(len(self.subjects))
        # torch.compile guards against inference tensors
        mode = torch.no_grad() if runtime == COMPILED else torch.inference_mode()
        with mode:
            calls = dict(self._calls(runtime, batch_size))
            if not calls:
                return
            series = time_alternately(list(calls.values()), self.clock, self.plan.limits)
        measured = dict(zip(calls, series, strict=True))
        reference = measured.get(self.subjects[0].name)
        for name, times in measured.items():
            ratio = speedup(reference, times) if reference and times is not reference else None
            latency = latency_of(times, batch_size)
            self.measurements.append(Measurement(runtime, batch_size, name, latency, ratio))

    def _calls(self, runtime: str, batch_size: int) -> Iterator[tuple[str, Callable[[], object]]]:
        for subject in self.subjects:
            if subject.network is None and runtime != ONNX:
                continue
            try:
                yield subject.name, self._call(subject, runtime, batch_size)
            except NotMeasured as error:
                self.not_measured.append(f"{subject.name}, batch {batch_size}: {error}")

    def _call(self, subject: Subject, runtime: str, batch_size: int) -> Callable[[], object]:
        place = self.plan.placement
        images = self._images(subject, batch_size)
        if runtime == ONNX:
            if subject.name not in self.sessions:
                if subject.onnx is None:
                    raise NotMeasured("it cannot be converted to ONNX")
                content = subject.onnx()
                session = onnx_session(content, place.device, self.plan.threads)
                self.sessions[subject.name] = session
            return onnx_call(self.sessions[subject.name], images)
        assert subject.network is not None
        return (compiled if runtime == COMPILED else eager)(subject.network, images)

    def _images(self, subject: Subject, batch_size: int) -> torch.Tensor:
        place = self.plan.placement
        images = random_images((batch_size, *subject.shape), place.device, torch.float32)
        return place.images(images)

    def compare_layers(self, batch_size: int) -> None:
        """Profile the networks in turn, and compare each with the reference."""
        networks = [
            (subject.network, self._images(subject, batch_size))
            for subject in self.subjects
            if subject.network is not None
        ]
        if self.subjects[0].network is None or len(networks) < 2:
            return
        seconds = LAYER_SHARE * self.plan.limits.seconds
        with torch.inference_mode():
            profiles = profile_alternately(networks, self.clock, seconds)
        measured = [subject for subject in self.subjects if subject.network is not None]
        for subject, profile in list(zip(measured, profiles, strict=True))[1:]:
            macs = measured[0].macs, subject.macs
            layers = compare_profiles(profiles[0], profile, *macs)
            self.comparisons.append(LayerComparison(batch_size, subject.name, tuple(layers)))
