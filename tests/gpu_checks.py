"""The job on one CUDA device: run by gpu.sh, never collected elsewhere.

``GPU_CHECKS_DEVICE=cpu`` rehearses the same checks without a GPU, on smaller data.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import job
from job.config import PruneConfig
from job.data.batches import AugmentedImages, UnrotatedBatch
from job.data.device_batches import move_batches
from job.data.layout import open_data
from job.data.loader import Loader, iterate_batches
from job.data.preprocessing import Preprocessing
from job.data.samplers import GlobalBatches
from job.data.splits import ArraySplit
from job.distributed.collectives import leave, start
from job.training.evaluation import Evaluator
from job.training.session import RoundSpec, Unattended
from job.training.sync_batchnorm import synchronised
from job.training.trainer import Trainer, TrainingRound
from support.commands import ROOT, Result, clean_environ
from support.datasets import write_noise_idx
from support.networks import Norms

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from conditions import conditions, publish
from photos import write_photos
from speed_worker import job_turn, parse

DEVICE = os.environ.get("GPU_CHECKS_DEVICE", "cuda")
CUDA = DEVICE == "cuda"
PRECISIONS = ("fp32", "bf16")
PRECISION = "auto" if CUDA else "bf16"  # of all checks in this process: Accelerate keeps one
SMALL = Preprocessing.of("small", 32)
ROWS: list[dict[str, Any]] = []  # what was measured
CHECKS: list[dict[str, Any]] = []  # what was checked


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    found = conditions(DEVICE)
    yield
    output = Path(os.environ.get("GPU_CHECKS_OUTPUT", "gpu-checks.json"))
    publish("Checks", CHECKS, {}, None)
    publish("Measured", ROWS, found, output)
    content = json.loads(output.read_text()) | {"checks": CHECKS}
    output.write_text(json.dumps(content, indent=2) + "\n")
    leave()  # loader processes ignore signals


@pytest.fixture(autouse=True)
def noted(request: pytest.FixtureRequest) -> Iterator[None]:
    began, failed = time.perf_counter(), request.session.testsfailed
    yield
    outcome = "failed" if request.session.testsfailed > failed else "passed"
    seconds = round(time.perf_counter() - began, 1)
    CHECKS.append({"check": request.node.name, "outcome": outcome, "seconds": seconds})


def note(what: str, value: float | None, unit: str) -> None:
    ROWS.append({"what": what, "value": value, "unit": unit})


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "job", *map(str, args)]


def environ(**more: str) -> dict[str, str]:
    return {**clean_environ(), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", **more}


def gammaslim(*args: object, **more: str) -> Result:
    done = subprocess.run(
        command(*args),
        env=environ(**more),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return Result(done)


def options(output: Path, precision: str) -> tuple[object, ...]:
    return (
        "prune", "--output", output, "--device", DEVICE, "--precision", precision,
        "--base-epochs", 2, "--rounds", 1, "--epochs", 1, "--wandb", "off",
    )  # fmt: skip


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with the defaults, of fewer epochs and rounds, at each precision."""
    found = {}
    for precision in PRECISIONS:
        run = tmp_path_factory.mktemp("gpu") / precision
        began = time.perf_counter()
        done = gammaslim(*options(run, precision))
        note(f"run with defaults at 32 pixels, {precision}", time.perf_counter() - began, "s")
        assert done.code == 0, done
        assert f"1 process, {DEVICE}, {precision}" in done.out, done
        entries = summary(run)
        speeds = sorted(entry["images_per_second"] for entry in events(run, "epoch"))
        note(f"its median epoch, {precision}", speeds[len(speeds) // 2], "images/s")
        note(f"its accuracy, {precision}", entries["rounds"][-1]["valid_acc"], "")
        found[precision] = run
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_with_defaults_learns_and_slims(runs: dict[str, Path], precision: str) -> None:
    entries = summary(runs[precision])
    assert entries["state"] == "finished"
    assert entries["base"]["valid_acc"] > 0.65
    assert entries["rounds"][-1]["valid_acc"] > 0.65
    assert entries["rounds"][-1]["params"] < entries["base"]["params"]


def test_the_processor_and_the_gpu_agree(runs: dict[str, Path]) -> None:
    results = []
    for device in ("cpu", DEVICE):
        done = gammaslim(
            "evaluate", runs["bf16"], "--json", "--split", "validation", "--device", device,
            "--precision", "fp32",
        )  # fmt: skip
        assert done.code == 0, done
        results.append(json.loads(done.out))
    one, other = results
    assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    moved = sum(
        abs(a - b)
        for left, right in zip(one["confusion"], other["confusion"], strict=True)
        for a, b in zip(left, right, strict=True)
    )
    assert moved <= 0.02 * one["count"]


def test_bench_measures_base_and_slim(runs: dict[str, Path]) -> None:
    done = gammaslim("bench", runs["fp32"], "--device", DEVICE, "--seconds", 0.3, "--json")
    assert done.code == 0, done
    found = json.loads(done.out)
    assert found["device"].startswith(DEVICE)
    for entry in found["measurements"]:
        what = f"bench: {entry['network']}, batch of {entry['batch_size']}, {entry['runtime']}"
        note(what, entry["latency"]["median"] * 1e3, "ms")


# --- a run: stop, resume, several kinds of processes


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise_idx(tmp_path_factory.mktemp("noise") / "idx", 512, 64)


def short(noise: Path, output: Path, *more: object) -> tuple[object, ...]:
    """A run whose device depends on what the process can see."""
    return (
        "prune", "--data", noise, "--output", output, "--model-arg", "base=4", "--base-epochs", 6,
        "--rounds", 1, "--epochs", 2, "--wandb", "off", "--optimizer", "sgd", "--lr", "0.05", *more,
    )  # fmt: skip


def stop_after_an_epoch(run: Path, *args: object, **more: str) -> None:
    """Start a run, and stop it after one more epoch than it has."""
    done = len(events(run, "epoch")) if (run / "metrics.jsonl").exists() else 0
    with subprocess.Popen(
        command(*args), env=environ(**more), stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            if (run / "metrics.jsonl").exists() and len(events(run, "epoch")) > done:
                (run / "STOP").touch()
                break
            time.sleep(0.02)
        assert process.wait(200) in (0, 75)


HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


def assert_alike(one: Path, other: Path) -> None:
    """Training magnifies the rounding of a device: the first epoch agrees closely."""
    losses = [[entry["train_loss"] for entry in events(run, "epoch")] for run in (one, other)]
    first, second = (values[0] for values in losses)
    assert first == pytest.approx(second, rel=0.03)
    assert losses[0] == pytest.approx(losses[1], abs=0.2)


def test_a_position_of_the_processor_resumes_on_the_gpu_and_back(
    noise: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    args = short(noise, run, "--precision", "fp32")
    stop_after_an_epoch(run, *args, **HIDDEN)  # written on the CPU
    stop_after_an_epoch(run, *args)  # resumed on the GPU, written there
    done = gammaslim(*args, **HIDDEN)
    assert done.code == 0, done
    whole = tmp_path / "whole"
    done = gammaslim(*short(noise, whole, "--precision", "fp32"), **HIDDEN)
    assert done.code == 0, done
    mine, theirs = events(run, "epoch"), events(whole, "epoch")
    assert [e["step"] for e in mine] == [e["step"] for e in theirs]
    assert_alike(run, whole)


@pytest.fixture(scope="module")
def plain(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run on the device, in one process that is not launched, not compiled."""
    run = tmp_path_factory.mktemp("plain") / "run"
    done = gammaslim(*short(noise, run, "--precision", "fp32", "--device", DEVICE))
    assert done.code == 0, done
    return run


def test_nccl_with_one_process_is_one_process(noise: Path, plain: Path, tmp_path: Path) -> None:
    args = short(noise, tmp_path / "run", "--precision", "fp32", "--device", DEVICE)
    done = gammaslim("launch", "--nproc", 1, "--", *args)
    assert done.code == 0, done
    assert f"1 process, {DEVICE}, fp32" in done.out
    assert_alike(plain, tmp_path / "run")


COLLECTIVES = """
import torch, torch.distributed as dist
from job.distributed.collectives import check_same, gather, leave, on_main, start, total
device = start("auto", "fp32").device
assert dist.get_backend() == ("nccl" if device.type == "cuda" else "gloo"), dist.get_backend()
values = total(torch.arange(4.0, device=device))
dist.all_reduce(values)  # the job leaves it out with one process
assert values.tolist() == [0, 1, 2, 3]
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2).to(device))
network(values).sum().backward()
assert network.module.weight.grad.tolist() == [[0, 1, 2, 3]] * 2
assert gather("x") == ["x"] and on_main(lambda: 3) == 3
check_same("a", "this")
print("all collectives", flush=True)
leave()
"""


def test_the_collectives_work_over_nccl(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env=environ(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert "all collectives" in done.stdout, done


def test_a_compiled_run_is_compiled_once_a_round(noise: Path, plain: Path, tmp_path: Path) -> None:
    run, began = tmp_path / "run", time.perf_counter()
    args = short(noise, run, "--precision", "fp32", "--device", DEVICE, "--compile")
    done = gammaslim(*args)
    assert done.code == 0, done
    assert done.out.count("the network is compiled") == 2
    note("short run with --compile, two compilations", time.perf_counter() - began, "s")
    assert_alike(plain, run)


# --- a step: precision, optimizer, copies


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Raise an error where the program waits for the GPU."""
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4))


def training_round(noise: Path, **more: Any) -> TrainingRound:
    data = open_data(str(noise))
    config = PruneConfig(device=DEVICE, batch_size=32, **more)  # type: ignore[arg-type]
    accelerator = start(DEVICE, PRECISION)
    evaluator = Evaluator(data.splits["validation"], 4, SMALL, accelerator, 0)
    trainer = Trainer(data.splits["training"], evaluator, config, SMALL, accelerator, 0)
    training = TrainingRound(trainer, small_network(), RoundSpec(0, 1), Unattended())
    training.prepared.train()
    return training


def test_autocast_computes_in_bf16_and_keeps_float32_weights(noise: Path) -> None:
    training = training_round(noise)
    if CUDA and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    kinds = []
    training.trained[0].register_forward_hook(lambda *args: kinds.append(args[2].dtype))
    images, labels = next(iterate_batches(training.trainer.batches, training.accelerator.device))
    training.step((images, labels), len(labels), 0)
    assert kinds == [torch.bfloat16]
    assert {p.dtype for p in training.trained.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in training.trained.parameters()} == {torch.float32}
    if CUDA:
        assert training.trained[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_is_fused_and_exact(noise: Path, name: Any) -> None:
    training = training_round(noise, optimizer=name)
    optimizer = training.optimizer
    assert all(group["fused"] for group in optimizer.param_groups)
    exact = [p.detach().double().cpu().requires_grad_() for p in training.trained.parameters()]
    groups = [
        {"params": [p for p in exact if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in exact if p.dim() <= 1], "weight_decay": 0.0},
    ]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    more = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    reference = kind(groups, lr=1e-3, **more)
    for step in range(3):
        for mine, theirs in zip(training.trained.parameters(), exact, strict=True):
            torch.manual_seed(step)
            mine.grad = torch.empty_like(mine).copy_(torch.randn(mine.shape))  # in its layout
            theirs.grad = mine.grad.double().cpu()
        optimizer.step()
        reference.step()
    for mine, theirs in zip(training.trained.parameters(), exact, strict=True):
        assert mine.device.type == DEVICE
        torch.testing.assert_close(mine.detach().cpu().double(), theirs, atol=1e-6, rtol=1e-5)


def test_nothing_waits_within_an_epoch(noise: Path) -> None:
    training = training_round(noise)
    device, trainer = training.accelerator.device, training.trainer
    number = 0
    for number, (images, labels) in enumerate(iterate_batches(trainer.batches, device)):
        if number == 1:  # the first step reports the network's outputs
            break
        training.step((images, labels), len(labels), number)
    with nothing_waits():
        for images, labels in iterate_batches(trainer.batches, device):
            number += 1
            training.step((images, labels), len(labels), number)
    assert number > 8
    evaluator = trainer.evaluator
    outputs = evaluator._outputs(training.trained, lambda batches: batches)
    with nothing_waits():
        for logits, labels in outputs:
            (logits.argmax(1) == labels).sum()
    assert evaluator(training.trained).count == 64


def test_batches_are_pinned_and_arrive_as_on_the_processor() -> None:
    """Rotated on the device, one batch ahead: the same bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 61, 61, 3), np.uint8)
    split = ArraySplit(pixels, np.arange(70, dtype=np.int64))
    sampler = GlobalBatches(70, 16, seed=1, rank=0, world=1)
    preset = Preprocessing.of("homework", 48)
    here = Loader(AugmentedImages(split, preset), sampler, workers=0, pin=False)
    later = AugmentedImages(split, preset, rotate_later=True)
    there = Loader(later, sampler, workers=0, pin=CUDA)
    for batch in there:
        assert isinstance(batch, UnrotatedBatch)
        assert not CUDA or all(part.is_pinned() for part in batch)
    moved = list(move_batches(there, torch.device(DEVICE), ahead=True))
    for (images, labels), (same, same_labels) in zip(here, moved, strict=True):
        assert same.device.type == DEVICE
        assert torch.equal(images, same.cpu())
        assert torch.equal(labels, same_labels.cpu())


def test_one_process_trains_with_torchs_own_batchnorm() -> None:
    """A step on the device, in either layout, is one in float64."""
    torch.manual_seed(0)
    exact = Norms().double().train()
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    for layout in (torch.contiguous_format, torch.channels_last):
        whole = copy.deepcopy(exact)
        ours = copy.deepcopy(exact).float().to(DEVICE)
        ours.to(memory_format=layout)
        kinds = [type(module) for module in ours.modules()]
        synchronised(ours, torch.device(DEVICE))
        assert [type(module) for module in ours.modules()] == kinds
        F.cross_entropy(whole(images.double()), labels).backward()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            inputs = images.to(DEVICE).contiguous(memory_format=layout)
            F.cross_entropy(ours(inputs), labels.to(DEVICE)).backward()
        for (name, mine), theirs in zip(ours.named_parameters(), whole.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(
                mine.grad.cpu().double(), theirs.grad, atol=1e-4, rtol=1e-3, msg=name
            )
        for mine, theirs in zip(ours.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(mine.cpu().double(), theirs.double(), atol=1e-5, rtol=1e-4)


# --- a cut on the device


def ranked_network() -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.1, 1.0)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
    return network


def test_a_cut_by_gamma_is_proven_on_the_device() -> None:
    network = ranked_network()
    more = {"importance": "gamma", "compensate": "none", "target": "macs=0.5"}
    images = torch.rand(2, 3, 64, 64)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        narrow, plan = job.slim(network, images, **more)
        placed = copy.deepcopy(network).to(DEVICE)
        there, same = job.slim(placed, images.to(DEVICE), **more)
    assert same.proof
    assert same.proof.precision == "float64"
    assert same.proof.error <= 1e-9
    assert same.layers == plan.layers
    assert next(there.parameters()).device.type == DEVICE
    torch.testing.assert_close(there.cpu()(images), narrow(images), atol=1e-4, rtol=1e-3)


def test_compensation_on_the_device_keeps_the_outputs() -> None:
    network = ranked_network()
    torch.manual_seed(1)
    images = torch.rand(64, 3, 32, 32)
    losses = []
    for device in ("cpu", DEVICE):
        placed = copy.deepcopy(network).to(device)
        batches = list(images.to(device).split(16))
        errors = []
        for compensate in ("none", "regress"):
            narrow, plan = job.slim(
                placed, batches[0], target="macs=0.7", calibration=batches, importance="gamma",
                compensate=compensate,
            )  # fmt: skip
            assert plan.proof
            with torch.no_grad():
                wanted = placed(images.to(device))
                error = F.mse_loss(narrow(images.to(device)), wanted) / wanted.var()
            errors.append(float(error))
        assert errors[1] < errors[0]
        losses.append(errors[1])
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


# --- the benchmark


def worker(kind: str, data: Path, *more: str) -> Namespace:
    size = ("--size", "256" if CUDA else "64", "--device", DEVICE, "--precision", PRECISION)
    args = parse([kind, "--data", str(data), "--workers", "4" if CUDA else "1", *size, *more])
    args.idle = 0.0
    return args


def best_speed(turn: Any, args: Namespace, turns: int = 3) -> float:
    speeds = []
    for _ in range(turns):
        args.idle, began = 0.0, time.perf_counter()
        count = turn()
        speeds.append(count / (time.perf_counter() - began - args.idle))
    return max(speeds)


def busy_share(turn: Any) -> float | None:
    """The share of the time of a turn in which a kernel or a copy runs."""
    if not CUDA:
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        turn()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == DeviceType.CUDA
    )
    busy = end = 0.0
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy / 1e6 / seconds


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "data"
    return write_photos(folder, *((1920, 64) if CUDA else (64, 16)))


@pytest.mark.parametrize("model", ["student", "resnet50"] if CUDA else ["student"])
def test_speed_of_the_job(photos: Path, model: str) -> None:
    device = torch.device(DEVICE)
    args = worker("job-epoch", photos, "--model", model, "--steps", "20" if CUDA else "2")
    epoch = job_turn(args, "epoch")
    epoch()  # builds the cache, starts the loader
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    speed = best_speed(epoch, args)
    if CUDA:
        note(f"{model}: GPU memory at the peak", torch.cuda.max_memory_allocated() / 1e9, "GB")
    alone = best_speed(job_turn(args, "step"), args)
    loader = best_speed(job_turn(args, "loader"), args)
    note(f"{model} at {args.size} pixels, batches of 32: epoch", speed, "images/s")
    note(f"{model}: step on a resident batch", alone, "images/s")
    note(f"{model}: loader alone, 4 processes, warm cache", loader, "images/s")
    note(f"{model}: GPU busy in an epoch", busy_share(epoch), "")
    assert speed > 0
    torch.get_device_module(device).synchronize()


def test_seconds_of_a_cut() -> None:
    name, pixels, count = ("resnet50", 224, 128) if CUDA else ("resnet18", 64, 16)
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval().to(DEVICE)
    batches = list(torch.rand(count, 3, pixels, pixels, device=DEVICE).split(16))
    began = time.perf_counter()
    _, plan = job.slim(network, batches[0], target="macs=0.5", calibration=batches)
    note(f"default cut of {name}, {count} images at {pixels}", time.perf_counter() - began, "s")
    assert plan.proof
