"""The time of an epoch on many processes: a model from hardware figures, and a check of it.

    python tests/benchmarks/scaling.py predict   # on 1, 8, and 4 x 8 GPUs, and published figures
    python tests/benchmarks/scaling.py check     # one and two processes of this machine, measured

A step is one process's share of the global batch. Its time is the longest of what runs at the same
time: the loader (decoding, or copying from a warm cache), the copy to the device, and the
computation. The computation is the sum over layers of the longer of arithmetic and memory
traffic, or the time of the host to start them if that is longer; the reductions of synchronised
BatchNorm, which nothing hides; and what the backward pass does not hide of the all-reduce of
gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.multiprocessing
from conditions import conditions, publish
from photos import write_photos
from speed import environ
from torch import nn

from job.models.student import StudentNet

Rows = list[dict[str, Any]]
BUCKET = 25e6  # bytes of gradients in a bucket of DistributedDataParallel: the last one is exposed


@dataclass(frozen=True)
class Hardware:
    """Stated figures of one process and of the links between processes."""

    name: str
    macs: float  # multiply-adds a second, sustained in convolutions
    memory: float  # bytes a second, sustained
    host: float  # seconds to start a layer, forward; the backward pass takes as long
    cores: float  # of the loader, a process
    decode: float  # JPEGs of 512 pixels a second, a core
    crop: float  # crops of 256 pixels out of the cache a second, a core
    copy: float  # bytes a second from pinned memory to the device
    link: float  # bytes a second of an all-reduce within a node (bus bandwidth)
    network: float  # the same between nodes
    latency: float  # seconds of a small all-reduce within a node
    far_latency: float  # the same between nodes


def gpu(name: str, flops: float, memory: float, copy: float, link: float) -> Hardware:
    """Figures of a GPU from its data sheet.

    Convolutions sustain a third of the arithmetic in bf16, pointwise layers 0.6 of the memory's
    rate, and all-reduces 0.4 of the links', in each direction; between nodes there are 400 Gb/s a
    GPU, of which they reach 40 GB/s. The rates of a core were measured.
    """
    return Hardware(
        name, flops / 6, 0.6 * memory, 3e-5, 12, 980, 15_900, copy, 0.4 * link, 40e9, 2e-5, 5e-5
    )


H100 = gpu("H100 SXM", 989e12, 3.35e12, 50e9, 900e9)
A100 = gpu("A100 SXM", 312e12, 2.04e12, 25e9, 600e9)
# ResNet-50 v1.5, PyTorch, mixed precision, batches of 256: NVIDIA/DeepLearningExamples; BatchNorm
# is not synchronised there
PUBLISHED = {1: 2_470, 8: 16_621}


@dataclass(frozen=True)
class Layer:
    """Cost of one layer and one image, forward."""

    macs: float
    values: float  # elements read and written
    norm: bool


def layers_of(network: nn.Module, size: int) -> list[Layer]:
    """Return the costs of the leaves of a network, from one pass on the meta device."""
    layers: list[Layer] = []

    def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        weight = getattr(module, "weight", None)
        macs = 0.0
        if isinstance(module, nn.Conv2d):
            macs = output[0, 0].numel() * weight.numel()
        elif isinstance(module, nn.Linear):
            macs = weight.numel()
        norm = isinstance(module, nn.BatchNorm2d)
        layers.append(Layer(macs, inputs[0].numel() + output.numel(), norm))

    network = network.to("meta")
    hooks = [m.register_forward_hook(note) for m in network.modules() if not list(m.children())]
    network.eval()(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return layers


def predict(
    network: nn.Module,
    size: int,
    images: int,
    batch: int,
    nodes: int,
    each: int,
    on: Hardware,
    *,
    synchronised: bool = True,
) -> dict[str, float]:
    """Return the parts of a step of ``batch`` images a process, and the seconds of an epoch."""
    layers, world = layers_of(network, size), nodes * each
    forward = sum(_seconds(layer, batch, 1, on) for layer in layers)
    backward = sum(_seconds(layer, batch, 2, on) for layer in layers)
    backward = max(backward, len(layers) * on.host)
    forward = max(forward, len(layers) * on.host)
    latency = 0.0 if world == 1 else on.far_latency if nodes > 1 else on.latency
    norms = 2 * latency * sum(layer.norm for layer in layers) * synchronised
    params = sum(parameter.numel() for parameter in network.parameters())
    optimizer = params * 4 * 7 / on.memory  # reads 4 tensors, writes 3
    computation = forward + backward + norms + optimizer
    reduce = exposed(4 * params, backward, latency, nodes, each, on)
    loader = {"cold": batch / (on.cores * on.decode), "warm": batch / (on.cores * on.crop)}
    copy = batch * 3 * 256 * 256 / on.copy  # uint8
    steps = math.ceil(images / (batch * world))
    return {
        "forward, backward (ms)": 1e3 * (forward + backward),
        "BatchNorm (ms)": 1e3 * norms,
        "all-reduce exposed (ms)": 1e3 * reduce,
        "loader warm (ms)": 1e3 * loader["warm"],
        "loader cold (ms)": 1e3 * loader["cold"],
        "epoch warm (s)": steps * max(computation + reduce, loader["warm"], copy),
        "epoch cold (s)": steps * max(computation + reduce, loader["cold"], copy),
        "images/s warm": batch * world / max(computation + reduce, loader["warm"], copy),
    }


def _seconds(layer: Layer, batch: int, passes: int, on: Hardware) -> float:
    """Return the seconds of a layer in bf16: its backward pass has two products and two inputs."""
    values = layer.values * (1.5 if layer.norm else 1.0)  # statistics take a pass of their own
    traffic = 2 * values * (1 if passes == 1 else 1.5)
    return max(batch * passes * layer.macs / on.macs, batch * traffic / on.memory)


def exposed(
    size: float, backward: float, latency: float, nodes: int, each: int, on: Hardware
) -> float:
    """Return the seconds of an all-reduce of ``size`` bytes that no backward pass hides."""
    world = nodes * each
    if world == 1:
        return 0.0
    rate = 2 * (world - 1) / world / (on.network if nodes > 1 else on.link)
    buckets = math.ceil(size / BUCKET)
    whole = size * rate + buckets * latency
    return max(min(size, BUCKET) * rate + latency, whole - backward)


def predictions(args: argparse.Namespace) -> Rows:
    import torchvision

    rows: Rows = []
    networks = {
        "StudentNet": (StudentNet(), 256, 9_866, 32),
        "ResNet-50": (torchvision.models.resnet50(), 224, 1_281_167, 128),
    }
    for name, (network, size, images, batch) in networks.items():
        one = 0.0
        for nodes, each in ((1, 1), (1, 8), (4, 8)):
            parts = predict(network, size, images, batch, nodes, each, H100)
            one = one or parts["images/s warm"]
            gain = parts["images/s warm"] / one / (nodes * each)
            place = {"network": name, "GPUs": f"{nodes} x {each}", "batch": batch}
            rows.append({**place, "on": H100.name, **parts, "of linear": gain})
    network = networks["ResNet-50"][0]
    for each, published in PUBLISHED.items():
        parts = predict(network, 224, 1_281_167, 256, 1, each, A100, synchronised=False)
        place = {"network": "ResNet-50", "GPUs": f"1 x {each}", "batch": 256, "on": A100.name}
        ratio = {"published": published, "model / published": parts["images/s warm"] / published}
        rows.append({**place, **parts, **ratio})
    return rows


def check(args: argparse.Namespace) -> Rows:
    """Epochs of one process, of two alone, and of two together; the latter against the model."""
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        data = write_photos(folder / "photos", args.images, 32)
        run_all(data, folder, args, "fill", 1, 1)
        turns: dict[str, list[float]] = {"one": [], "two alone": [], "two together": []}
        for turn in range(args.turns):
            turns["one"].append(run_all(data, folder, args, f"a{turn}", 1, 1))
            turns["two alone"].append(run_all(data, folder, args, f"b{turn}", 2, 1))
            turns["two together"].append(run_all(data, folder, args, f"c{turn}", 1, 2))
    speeds = {name: statistics.median(values) for name, values in turns.items()}
    small, gradients = reductions()
    network = StudentNet(num_classes=11)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    batch = args.batch / 2  # a process of two together
    alone = 2 * batch / speeds["two alone"]  # its step, without the other's numbers
    model = 2 * batch / (alone + 2 * norms * small + gradients)
    rows: Rows = [{"what": name, "images/s": speed} for name, speed in speeds.items()]
    for row in rows[2:]:
        row["of two alone"] = row["images/s"] / speeds["two alone"]
    rows.append({"what": "two together, model", "images/s": model})
    rows[-1]["of two alone"] = model / speeds["two alone"]
    rows[-1]["measured / model"] = speeds["two together"] / model
    rows[-1] |= {"BatchNorm (ms)": 2e3 * norms * small, "all-reduce (ms)": 1e3 * gradients}
    return rows


def run_all(
    data: Path, folder: Path, args: argparse.Namespace, name: str, jobs: int, processes: int
) -> float:
    """Return the images a second of ``jobs`` runs at once, each on single-threaded processes."""
    started = []
    for job in range(jobs):
        run = folder / f"{name}-{job}"
        prune = [
            "prune", "--data", data, "--output", run, "--transform", "homework", "--image-size",
            args.size, "--batch-size", args.batch * processes // 2, "--base-epochs", 3,
            "--rounds", 0, "--wandb", "off", "--device", "cpu", "--cache", "disk", "--cache-dir",
            folder / "cache", "--workers", 0,
        ]  # fmt: skip
        launch = ["launch", "--nproc", processes, "--"] if processes > 1 else []
        command = [sys.executable, "-m", "job", *launch, *prune]
        process = subprocess.Popen(
            list(map(str, command)),
            env=environ() | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        started.append((run, process))
    total = 0.0
    for run, process in started:
        if process.wait():
            raise SystemExit(f"the run ended with code {process.returncode}")
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
        epochs = [json.loads(line) for line in lines]
        speeds = [e["images_per_second"] for e in epochs if "images_per_second" in e]
        total += statistics.median(speeds[1:])
    return total


def reductions() -> tuple[float, float]:
    """Return the seconds of a small all-reduce and of one of StudentNet's gradients, by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_reduce, args=(folder,), nprocs=2)
        small, gradients = json.loads((Path(folder) / "seconds").read_text())
    return small, gradients


def _reduce(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for count in (128, sum(p.numel() for p in StudentNet().parameters())):
        values, times = torch.ones(count), []
        for _ in range(60):
            began = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - began)
        found.append(statistics.median(times))
    if rank == 0:
        (Path(folder) / "seconds").write_text(json.dumps(found))
    dist.destroy_process_group()


COMMANDS = {"predict": predictions, "check": check}
TITLES = {
    "predict": "An epoch by the model, bf16",
    "check": "StudentNet, one thread a process, batches of the same size a process",
}


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--size", type=int, default=256, help="side of the inputs, in pixels")
    parser.add_argument("--images", type=int, default=320, help="training images of an epoch")
    parser.add_argument("--batch", type=int, default=32, help="images of two processes together")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where a temporary folder is made")
    parser.add_argument("--output", type=Path, help="JSON file; default scaling-COMMAND.json")
    args = parser.parse_args(None if argv is None else list(argv))
    found = conditions()
    rows = COMMANDS[args.command](args)
    output = args.output or Path(f"scaling-{args.command}.json")
    publish(TITLES[args.command], rows, found, output)


if __name__ == "__main__":
    main()
