"""Networks compared on one device: latency at several batch sizes in several runtimes, and layers.

All networks are timed in turn in one run. The first network is the reference of speed-ups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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

LAYER_SECONDS = 0.5  # for the profile of each network, of the seconds of a measurement


@dataclass(frozen=True, eq=False)
class Subject:
    """Network to measure on images of ``shape`` (C, H, W).

    ``macs`` are the multiply-adds of its layers, by name. ``onnx`` returns it as an ONNX model; a
    subject without a ``network`` is one already. Raises NotMeasured if that is not possible.
    """

    name: str
    shape: tuple[int, ...]
    network: nn.Module | None
    macs: Mapping[str, int]
    onnx: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class Measurement:
    """Latency of one network; ``speedup`` is relative to the reference, if there is one."""

    runtime: str
    batch_size: int
    network: str
    latency: Latency
    speedup: Speedup | None


@dataclass(frozen=True)
class LayerComparison:
    """Layers of one network compared with those of the reference, in eager mode."""

    batch_size: int
    network: str
    layers: tuple[LayerChange, ...]


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of a benchmark: all measurements, and the reasons for missing ones."""

    measurements: tuple[Measurement, ...]
    comparisons: tuple[LayerComparison, ...]
    not_measured: tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkPlan:
    """Plan of a benchmark. ``threads`` is the number of threads of torch, for other runtimes."""

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
    """Measure all ``subjects``; their networks are moved to the device and stay there."""
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
        tuple(run.measurements), tuple(run.comparisons), tuple(dict.fromkeys(run.left_out))
    )


class _Benchmark:
    """State of a benchmark in progress."""

    def __init__(self, subjects: Sequence[Subject], plan: BenchmarkPlan, clock: Clock) -> None:
        self.subjects, self.plan, self.clock = subjects, plan, clock
        self.measurements: list[Measurement] = []
        self.comparisons: list[LayerComparison] = []
        self.left_out: list[str] = []
        self.sessions: dict[str, Any] = {}  # of onnxruntime, by the name of the network

    def measure(self, runtime: str, batch_size: int) -> None:
        """Time all networks that the runtime takes, in turn."""
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
        for name, own in measured.items():
            gain = speedup(reference, own) if reference and own is not reference else None
            latency = latency_of(own, batch_size)
            self.measurements.append(Measurement(runtime, batch_size, name, latency, gain))

    def _calls(self, runtime: str, batch_size: int) -> Iterator[tuple[str, Callable[[], object]]]:
        for subject in self.subjects:
            if subject.network is None and runtime != ONNX:
                continue
            try:
                yield subject.name, self._call(subject, runtime, batch_size)
            except NotMeasured as error:
                self.left_out.append(f"{subject.name}, batch {batch_size}: {error}")

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
        seconds = LAYER_SECONDS * self.plan.limits.seconds
        with torch.inference_mode():
            profiles = profile_alternately(networks, self.clock, seconds)
        measured = [subject for subject in self.subjects if subject.network is not None]
        for subject, profile in list(zip(measured, profiles, strict=True))[1:]:
            macs = measured[0].macs, subject.macs
            layers = compare_profiles(profiles[0], profile, *macs)
            self.comparisons.append(LayerComparison(batch_size, subject.name, tuple(layers)))
