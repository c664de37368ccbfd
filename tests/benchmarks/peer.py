"""Gammaslim beside Torch-Pruning's BNScalePruner: seconds, exactness, accuracy at equal MACs.

    python tests/benchmarks/peer.py [--data FOLDER --seeds 3]

prints, for each network, the median seconds to analyse and to cut, both tools alternating in one
run, the multiply-adds reached for a target of one half, and the error of the cut in float64 against
the wide network without the removed channels. With ``--data`` (IDX files of 28 x 28, padded to 32)
it trains StudentNet and a small ResNet, cuts both ways to equal multiply-adds, and prints test
accuracies right after the cut and after one epoch of fine-tuning. Needs torch-pruning.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch_pruning
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import ablation

import job
from job.models.student import StudentNet
from job.slimming.analysis import analyse
from job.slimming.importance.criteria import gamma_importance
from job.slimming.planning.allocation import Allocation, make_plan
from job.slimming.planning.cost import network_cost
from job.slimming.planning.target import Budget
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "StudentNet": (lambda: StudentNet(num_classes=10), 256),
    "ResNet-18": (torchvision.models.resnet18, 224),
    "ResNet-50": (torchvision.models.resnet50, 224),
    "VGG-16-BN": (torchvision.models.vgg16_bn, 224),
    "MobileNetV2": (torchvision.models.mobilenet_v2, 224),
    "DenseNet-121": (torchvision.models.densenet121, 224),
}

PROOF = 64  # pixels, for the errors


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    """A network in eval mode whose BatchNorms differ from channel to channel."""
    torch.manual_seed(0)
    network = make().eval()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.1, 1.1)
                layer.bias.normal_(0, 0.3)
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 1.5)
    return network


def theirs(network: nn.Module, image: torch.Tensor, ratio: float) -> torch_pruning.BasePruner:
    """Their pruner, global, that leaves the classifier's outputs."""
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    return torch_pruning.pruner.BNScalePruner(
        network, image, torch_pruning.importance.BNScaleImportance(),
        pruning_ratio=ratio, global_pruning=True, ignored_layers=[last],
    )  # fmt: skip


def their_seconds(network: nn.Module, image: torch.Tensor, ratio: float) -> tuple[float, float]:
    network = copy.deepcopy(network)
    gc.collect()  # what earlier runs have left is not this one's
    began = time.perf_counter()
    pruner = theirs(network, image, ratio)
    built = time.perf_counter()
    pruner.step()
    return built - began, time.perf_counter() - built


def our_seconds(network: nn.Module, image: torch.Tensor, target: str) -> tuple[float, float]:
    gc.collect()
    began = time.perf_counter()
    graph = analyse(network, image)
    known = time.perf_counter()
    scores = gamma_importance(network, graph)
    plan = make_plan(network, graph, scores, Allocation("global", Budget.parse(target)))
    apply_plan(network, plan.layers)
    return known - began, time.perf_counter() - known


def their_error(network: nn.Module, image: torch.Tensor, ratio: float) -> float:
    """Largest error over their groups: zeroed inputs of readers against the cut, in float64."""
    network, worst = copy.deepcopy(network).double(), 0.0
    images = torch.rand(2, *image.shape[1:], dtype=torch.float64)
    for group in theirs(network, image.double(), ratio).step(interactive=True):
        for dependency, indices in group:
            layer = dependency.target.module
            if dependency.handler in READERS and getattr(layer, "groups", 1) == 1:
                with torch.no_grad():
                    layer.weight[:, indices] = 0
        with torch.inference_mode():
            masked = network(images)
        group.prune()
        with torch.inference_mode():
            worst = max(worst, float((network(images) - masked).abs().max() / masked.abs().max()))
    return worst


READERS = (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)


def compare(name: str, repeat: int) -> list[str]:
    """A row of the first table."""
    make, size = NETWORKS[name]
    network, image = fresh(make), torch.rand(1, 3, size, size)
    whole = network_cost(network, size).macs
    ratio = 1 - 0.5**0.5  # of the channels; they have no target of multiply-adds
    runs: list[list[tuple[float, float]]] = [[], []]
    for _ in range(repeat + 1):  # alternating; the first pair warms up
        runs[0].append(their_seconds(network, image, ratio))
        runs[1].append(our_seconds(network, image, "macs=0.5"))
    medians = [[statistics.median(part) for part in zip(*run[1:], strict=True)] for run in runs]
    cut = copy.deepcopy(network)
    theirs(cut, image, ratio).step()
    _, plan = job.slim(network, image, target="macs=0.5")
    small = torch.rand(1, 3, PROOF, PROOF)
    narrow, proven = job.slim(network, small, target="macs=0.5")
    error = verify(network, narrow, proven.layers, small).error
    times = [f"{analysis:.3f} + {step:.3f}" for analysis, step in medians]
    return [
        name, *times, f"{sum(medians[0]) / sum(medians[1]):.1f}x",
        f"{network_cost(cut, size).macs / whole:.3f}", f"{plan.after.macs / whole:.3f}",
        f"{their_error(network, small, ratio):.0e}", f"{error:.0e}",
    ]  # fmt: skip


def cut_by_them(network: nn.Module, macs: int) -> nn.Module:
    """Their cut with the smallest ratio that leaves at most ``macs``."""
    image, low, high = torch.rand(1, 3, 32, 32), 0.0, 1.0
    best = network
    for _ in range(10):
        cut = copy.deepcopy(network)
        theirs(cut, image, (low + high) / 2).step()
        if network_cost(cut, 32).macs <= macs:
            best, high = cut, (low + high) / 2
        else:
            low = (low + high) / 2
    return best


def cuts(network: nn.Module, target: float, batches: list[ablation.Data]) -> dict[str, nn.Module]:
    """Networks of as many multiply-adds, by tool and method."""
    image, found = torch.rand(1, 3, 32, 32), {}
    found["Torch-Pruning"] = cut_by_them(network, int(network_cost(network, 32).macs * target))
    goal = {"target": f"macs={network_cost(found['Torch-Pruning'], 32).macs}", "min_keep": 0.05}
    found["γ"], _ = job.slim(network, image, **goal)
    found["refit, regress, recalibrated"], _ = job.slim(
        network, image, importance="refit", compensate="regress", recalibrate=len(batches),
        calibration=batches, **goal,
    )  # fmt: skip
    return found


def accuracies(args: argparse.Namespace) -> None:
    """The second table."""
    train, test = ablation.load(args.data, "train"), ablation.load(args.data, "t10k")
    few = train[0][: args.images], train[1][: args.images]
    print("| network | MACs aimed at | tool | MACs left | after the cut | after one epoch |")
    print("|---|---|---|---|---|---|")
    for kind in args.kinds:
        args.network, rows, bases = kind, {}, []
        for seed in range(args.seeds):
            network = ablation.base(args, seed, train)
            bases.append(ablation.accuracy(network, test))
            whole = network_cost(network, 32).macs
            chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
            parts = chosen[:4096].split(256)
            batches = [(ablation.to_inputs(train[0][part]), train[1][part]) for part in parts]
            for target in args.targets:
                for tool, narrow in cuts(network, target, batches).items():
                    left = network_cost(narrow, 32).macs / whole
                    after = ablation.accuracy(narrow, test)
                    tuned = ablation.accuracy(ablation.trained(narrow, few, 1, seed), test)
                    rows.setdefault((target, tool), []).append((left, after, tuned))
                    print(kind, seed, target, tool, left, after, tuned, file=sys.stderr, flush=True)
        for (target, tool), values in rows.items():
            left, after, tuned = map(statistics.mean, zip(*values, strict=True))
            name = f"{kind} ({statistics.mean(bases):.1f} %)"
            print(f"| {name} | {target:g} | {tool} | {left:.3f} | {after:.1f} | {tuned:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder with IDX files, to train on")
    parser.add_argument("--bases", type=Path, help="folder that keeps trained networks")
    parser.add_argument("--kinds", nargs="+", default=["student", "resnet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, help="number of images to fine-tune on; default: all")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5])
    args = parser.parse_args()
    heads = ["network", "Torch-Pruning, s", "Gammaslim, s", "faster", "their MACs", "our MACs"]
    if args.networks:
        heads += ["their error", "our error"]
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name in args.networks:
        print("| " + " | ".join(compare(name, args.repeat)) + " |", flush=True)
    if args.data:
        print()
        accuracies(args)


if __name__ == "__main__":
    main()
