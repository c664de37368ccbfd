"""What importance, compensation and recalibration are worth: accuracies with no fine-tuning.

    python tests/benchmarks/ablation.py --data FOLDER [--network resnet] [--seeds 3]

trains a network for a few epochs on the IDX files of FOLDER (28 x 28, padded to 32), cuts it to
fractions of its multiply-adds by the defaults and in every combination, and prints the mean test
accuracies over the seeds as a Markdown table. Three seeds of StudentNet take half an hour on one
core.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from networks import TRAINED_HERE

import job
from job.data.idx import read_idx
from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import CalibrationData, measure_inputs
from job.slimming.compensation.constants import add_biases, layers_without_constant
from job.slimming.compensation.cut_pair import CutPair
from job.slimming.compensation.methods import COMPENSATIONS, compensate_cut
from job.slimming.compensation.recalibration import recalibrate_batchnorms
from job.slimming.importance.criteria import score_channels
from job.slimming.planning.allocation import Allocation, make_plan
from job.slimming.planning.plan import keep_of
from job.slimming.planning.target import Budget
from job.slimming.surgery.surgery import apply_plan
from job.slimming.surgery.verification import verify

IMPORTANCES = ("gamma", "taylor", "refit")
DEFAULTS = "refit", "regress, by output losses"
BATCH = 256
Data = tuple[torch.Tensor, torch.Tensor]


def load(folder: Path, split: str) -> Data:
    """Images (N, 32, 32) uint8 and labels (N,)."""
    images = read_idx(next(folder.glob(f"{split}-images*")))
    labels = read_idx(next(folder.glob(f"{split}-labels*"))).astype(np.int64)
    return torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))), torch.from_numpy(labels)


def to_inputs(images: torch.Tensor) -> torch.Tensor:
    """Scale images (N, 32, 32) uint8 to inputs (N, 3, 32, 32) in [0, 1]."""
    return (images.float() / 255)[:, None].expand(-1, 3, -1, -1)


def trained(network: nn.Module, data: Data, epochs: int, seed: int) -> nn.Module:
    """Adam from 1e-3 down a cosine, batches of 128."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        network.train()
        for chosen in torch.randperm(len(images), generator=generator).split(128):
            if len(chosen) == 128:
                loss = F.cross_entropy(network(to_inputs(images[chosen])), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, data: Data) -> float:
    """Percent of the images that are told right."""
    batches = zip(data[0].split(500), data[1].split(500), strict=True)
    right = sum((network(to_inputs(x)).argmax(1) == y).sum().item() for x, y in batches)
    return 100 * right / len(data[1])


def base(args: argparse.Namespace, seed: int, train: Data) -> nn.Module:
    """The trained network, from ``--bases`` where it lies there."""
    torch.manual_seed(seed)
    network = TRAINED_HERE[args.network]().to(memory_format=torch.channels_last)
    path = args.bases and args.bases / f"{args.network}{seed}.pt"
    if path and path.exists():
        network.load_state_dict(torch.load(path))
        return network.eval()
    network = trained(network, train, args.epochs, seed)
    if path:
        torch.save(network.state_dict(), path)
    return network


def ablate(
    network: nn.Module, args: argparse.Namespace, train: Data, test: Data
) -> dict[tuple[str, str, bool, float], float]:
    """Accuracy by importance, compensation, recalibration and fraction of the multiply-adds."""
    images = torch.zeros(1, 3, 32, 32)
    chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
    parts = chosen[: args.calibration].split(BATCH)

    def batches() -> list[Data]:
        return [(to_inputs(train[0][part]), train[1][part]) for part in parts]

    found = {}
    for target in args.targets:
        narrow, _ = job.slim(
            network, images, policy="global", target=f"macs={target}",
            calibration=[inputs for inputs, _ in batches()],
        )  # fmt: skip
        found[*DEFAULTS, False, target] = accuracy(narrow, test)
        print("defaults", target, f"{found[*DEFAULTS, False, target]:.2f}", file=sys.stderr)
    graph = analyse(network, images)
    began = time.perf_counter()
    calibration = CalibrationData(batches, measure_inputs(network, graph, batches()))
    print(f"statistics {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for importance in args.importances:
        began = time.perf_counter()
        scores = score_channels(importance, network, graph, calibration)
        print(f"{importance} {time.perf_counter() - began:.1f} s", file=sys.stderr)
        for target in args.targets:
            plan = make_plan(network, graph, scores, Allocation("global", Budget("macs", target)))
            keep = keep_of(graph, plan.groups)
            for method in args.compensations:
                layers = plan.layers
                if method != "none":
                    layers = add_biases(layers, layers_without_constant(network, graph))
                narrow = apply_plan(network, layers)
                verify(network, narrow, layers, images)
                pair = CutPair(network, narrow, graph, keep, layers, images)
                compensate_cut(method, pair, calibration)
                for anew in (False, True):
                    if anew:
                        recalibrate_batchnorms(narrow, batches())
                    key = importance, method, anew, target
                    found[key] = accuracy(narrow, test)
                    print(*key, f"{found[key]:.2f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with IDX files")
    parser.add_argument("--bases", type=Path, help="folder that keeps trained networks")
    parser.add_argument("--network", choices=TRAINED_HERE, default="student")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--calibration", type=int, default=4096, help="number of images")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5, 0.4])
    parser.add_argument("--importances", nargs="+", default=IMPORTANCES)
    parser.add_argument("--compensations", nargs="+", default=list(COMPENSATIONS))
    args = parser.parse_args()
    train, test = load(args.data, "train"), load(args.data, "t10k")
    bases, found = [], defaultdict(list)
    for seed in range(args.seeds):
        network = base(args, seed, train)
        bases.append(accuracy(network, test))
        print(f"seed {seed}: base {bases[-1]:.2f} %", file=sys.stderr)
        for key, value in ablate(network, args, train, test).items():
            found[key].append(value)
    print(f"{args.network}, {args.seeds} seeds, base {statistics.mean(bases):.1f} %\n")
    print("| importance | compensation | recalibrated |", *(f"{t:g} |" for t in args.targets))
    print("|---|---|---|" + "---|" * len(args.targets))
    rows = itertools.product(args.importances, args.compensations, (False, True))
    for importance, method, anew in [(*DEFAULTS, False), *rows]:
        means = [statistics.mean(found[importance, method, anew, t]) for t in args.targets]
        row = [importance, method, "yes" if anew else "no", *(f"{mean:.1f}" for mean in means)]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
