"""``bench``: measured latency and throughput of networks, next to their costs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import torch

from job.artifacts.versions import package_versions
from job.cli.bench_models import open_networks
from job.console import phase, print_result, show_step
from job.errors import UsageError
from job.report.latency import benchmark_text
from job.slimming.latency.alternation import TimeLimits
from job.slimming.latency.benchmark import BenchmarkPlan, Conditions, run_benchmark
from job.slimming.latency.machine import device_name
from job.slimming.latency.runtimes import COMPILED, EAGER, ONNX, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.cli.bench_models import BenchNetwork
    from job.cli.command_options import BenchOptions, ModelOptions
    from job.files import JsonObject
    from job.slimming.latency.benchmark import BenchmarkResult

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def bench(model: ModelOptions, paths: Sequence[str], options: BenchOptions, as_json: bool) -> None:
    """Measure each MODEL and the base of the first one in turn, and print tables or JSON."""
    placement = _placement(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    export = options.onnx == "auto" and all(map(importlib.util.find_spec, ONNX_PACKAGES))
    export = export and placement.device.type == "cpu" and placement.precision == "fp32"
    networks = open_networks(model, paths, export=export)
    plan = BenchmarkPlan(
        placement,
        options.batch_sizes,
        _runtimes(options, networks, export=export),
        torch.get_num_threads(),
        TimeLimits(options.seconds, warmup=min(TimeLimits.warmup, options.seconds / 4)),
    )
    subjects = [network.subject for network in networks]
    result = run_benchmark(subjects, plan, partial(show_step, "measuring"))
    phase("")
    conditions = _conditions(plan)
    if as_json:
        print_result(json.dumps(_record(conditions, networks, result), indent=1))
    else:
        costs = {network.name: network.cost for network in networks}
        print_result(benchmark_text(conditions, costs, result))


def _placement(options: BenchOptions) -> Placement:
    """Return the device, precision and memory format; raises UsageError."""
    cuda = torch.cuda.is_available() and options.device != "cpu"
    if options.device == "cuda" and not cuda:
        raise UsageError("--device cuda: torch finds no CUDA GPU here")
    precision: str = options.precision
    if precision == "auto":
        best = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp16"
        precision = best if cuda else "fp32"
    if precision == "fp16" and not cuda:
        raise UsageError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return Placement(torch.device("cuda" if cuda else "cpu"), precision, options.memory_format)


def _runtimes(
    options: BenchOptions, networks: Sequence[BenchNetwork], *, export: bool
) -> tuple[str, ...]:
    files = any(network.subject.network is None for network in networks)
    torch_networks = any(network.subject.network is not None for network in networks)
    runtimes = (EAGER, *((COMPILED,) if options.compile else ())) if torch_networks else ()
    return (*runtimes, ONNX) if export or files else runtimes


def _conditions(plan: BenchmarkPlan) -> Conditions:
    placement = plan.placement
    versions = package_versions()
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
    return Conditions(
        device=placement.device.type,
        device_name=device_name(placement.device),
        threads=plan.threads,
        precision=placement.precision,
        memory_format=placement.memory_format,
        batch_sizes=plan.batch_sizes,
        seconds=plan.limits.seconds,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
    )


def _record(
    conditions: Conditions, networks: Sequence[BenchNetwork], result: BenchmarkResult
) -> JsonObject:
    """Return the object that ``--json`` prints."""
    described = [
        {
            "network": network.name,
            "path": network.path,
            "width": network.width,
            "image_size": network.subject.shape[-1],
            **(network.cost.to_dict() if network.cost else {}),
        }
        for network in networks
    ]
    measurements: list[JsonObject] = []
    for each in result.measurements:
        faster = each.speedup.faster if each.speedup else None
        measurements.append({**asdict(each), "faster": faster})
    return {
        **asdict(conditions),
        "reference": networks[0].name,
        "networks": described,
        "measurements": measurements,
        "layers": [asdict(comparison) for comparison in result.comparisons],
        "not_measured": list(result.not_measured),
    }
