"""Accuracy of pretrained networks right after one cut, and after fine-tuning, at equal cost.

Each cell of the table is one cut: a fraction of the multiply-adds or, with ``--cost latency``, of
the measured latency of one image, a method, a seed of the calibration sample. Cells are appended to
a file of JSON lines; those that it holds are not measured again, so that a run can be stopped and
continued.

    python tests/benchmarks/accuracy.py --network resnet56 --weights resnet56-cifar10.pt \
        --images cifar10 --output resnet56.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from costs import LONG, latency_share, macs_share
from images import IMAGENET, Data, Normalisation, accuracy, fine_tune, read_folder
from networks import build, load_weights
from torch import nn

import job
from job.slimming.compensation import reconstruction

METHODS: dict[str, dict[str, object]] = {
    "gammaslim": {},
    "depth off": {"depth": "off"},
    "allocate local": {"allocate": "local"},
    "recover 2": {"recover": 2},
    "gamma alone": {"importance": "gamma", "compensate": "none"},
    "channel maps": {},
}
PEERS = ("bnscale", "l2", "taylor")
BATCH = 128


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet56", help="as in networks.py")
    parser.add_argument("--weights", type=Path, required=True, help="a state dict, or a new file")
    parser.add_argument("--base-epochs", type=int, default=20, help="where --weights is a new file")
    parser.add_argument("--images", type=Path, required=True, help="train/ and test/ by class")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--count", type=int, default=4096, help="calibration images")
    parser.add_argument("--tested", type=int, default=None, help="test images; all by default")
    parser.add_argument("--cost", default="macs", choices=["macs", "latency"])
    parser.add_argument("--targets", default="0.7,0.5,0.44,0.3")
    parser.add_argument("--methods", default=",".join(METHODS), help="and torch-pruning's: peers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", default="1,5", help="of fine-tuning; 0 for none")
    parser.add_argument("--tuned", type=int, default=None, help="images an epoch")
    parser.add_argument("--bfloat16", action="store_true", help="fine-tune under autocast")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    return parser.parse_args()


def cells(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield the cells in the order in which they are measured: what matters most first."""
    methods = given.methods.split(",")
    methods = [m for name in methods for m in (PEERS if name == "peers" else (name,))]
    for seed in range(given.seeds):
        for target in map(float, given.targets.split(",")):
            for method in methods:
                yield {
                    "network": given.network, "cost": given.cost, "target": target,
                    "method": method, "seed": seed,
                }  # fmt: skip


def measure(given: argparse.Namespace) -> None:
    """Measure all cells that the output does not hold yet, and append them to it."""
    splits = read_folder(given.images, given.size)
    test = splits["test"].sample(given.tested, 1)
    normalise = Normalisation(*IMAGENET)
    wide = build(given.network, int(test[1].max()) + 1)
    if not given.weights.exists():
        fine_tune(wide, splits["train"].sample(None, 0), given.base_epochs, normalise)
        torch.save(wide.state_dict(), given.weights)
    wide = load_weights(wide, given.weights)
    base = accuracy(wide, test, normalise)
    known = [json.loads(line) for line in _lines(given.output)]
    for cell in cells(given):
        if any(cell.items() <= done.items() for done in known):
            continue
        sample = splits["train"].sample(given.count, int(str(cell["seed"])))
        images = normalise(sample[0])
        narrow, seconds, setting = cut(wide, cell, images, sample, normalise, splits)
        score = partial(accuracy, data=test, normalise=normalise)
        row = cell | {
            "base": base, "after cut": score(narrow), "cpu seconds": round(seconds, 1),
            "macs": macs_share(wide, given.size)(narrow),
            "latency": latency_share(wide, images[:1], LONG)(narrow), "setting": setting,
        }  # fmt: skip
        for epochs in filter(None, map(int, given.epochs.split(","))):
            everything = splits["train"].sample(given.tuned, 0)
            tuned = copy.deepcopy(narrow)
            fine_tune(tuned, everything, epochs, normalise, given.bfloat16)
            row[f"after {epochs} epochs"] = score(tuned)
        with given.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def cut(
    wide: nn.Module,
    cell: dict[str, object],
    images: torch.Tensor,
    sample: Data,
    normalise: Normalisation,
    splits: dict[str, object],
) -> tuple[nn.Module, float, str]:
    """Return the narrow network of a cell, the processor seconds of the cut, and the setting."""
    example, method = images[:1], str(cell["method"])
    if method in PEERS:
        held_out = splits["train"].sample(1000, int(str(cell["seed"])), skip=len(images))
        return _cut_by_peer(wide, cell, images, sample, normalise, held_out)
    began = time.process_time()
    with _channel_maps_alone() if method == "channel maps" else nullcontext():
        narrow, _ = job.slim(
            wide, example, target=f"{cell['cost']}={cell['target']}", policy="global",
            calibration=list(images.split(BATCH)), **METHODS[method],
        )  # fmt: skip
    return narrow, time.process_time() - began, ""


def _channel_maps_alone() -> AbstractContextManager[object]:
    """Return a context in which no kernel is fitted: maps of channels are fitted instead."""
    return mock.patch.object(reconstruction, "can_fit_kernel", return_value=False)


def _cut_by_peer(
    wide: nn.Module,
    cell: dict[str, object],
    images: torch.Tensor,
    sample: Data,
    normalise: Normalisation,
    held_out: Data,
) -> tuple[nn.Module, float, str]:
    from pruning_peer import cut_by_peer, measure_gradients

    method, target = str(cell["method"]), float(str(cell["target"]))
    score: Callable[[nn.Module], float] = partial(accuracy, data=held_out, normalise=normalise)
    network, seconds = copy.deepcopy(wide), 0.0
    if method == "taylor":
        batches = zip(images.split(BATCH), sample[1].split(BATCH), strict=True)
        seconds = measure_gradients(network, list(batches))
    share = macs_share(wide, images.shape[-1])
    if cell["cost"] == "latency":
        share = latency_share(wide, images[:1])
    best = cut_by_peer(method, network, images[:1], share, target, score)
    if best is None:
        raise SystemExit(f"{method}: no setting reaches {target} of the {cell['cost']}")
    return best.network, seconds + best.seconds, str(best.setting)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def table(rows: list[dict[str, object]]) -> str:
    """Return a Markdown table: medians over the seeds of the accuracies, in percent."""
    after = sorted({key for row in rows for key in row if key.startswith("after ")}, key=_stage)
    lines = [
        f"| target | method | MACs | latency | {' | '.join(after)} | CPU seconds |",
        "|---" * (5 + len(after)) + "|",
    ]
    for key in dict.fromkeys(map(_kind, rows)):
        same = [row for row in rows if _kind(row) == key]
        values = [_median(same, name) for name in after]
        seconds = statistics.median(float(str(row["cpu seconds"])) for row in same)
        costs = [_median(same, name) for name in ("macs", "latency")]
        texts = [f"{key[2]} {key[0]}", key[1], *costs, *values, f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(map(str, texts))} |")
    return "\n".join(lines)


def _kind(row: dict[str, object]) -> tuple[object, ...]:
    return row["target"], row["method"], row.get("cost", "macs")


def _stage(name: str) -> int:
    """Epochs of fine-tuning; 0 for "after cut"."""
    return int("".join(filter(str.isdigit, name)) or 0)


def _median(rows: list[dict[str, object]], name: str) -> str:
    values = [float(str(row[name])) for row in rows if name in row]
    return f"{statistics.median(values):.2f}" if values else ""


if __name__ == "__main__":
    ARGUMENTS = options()
    measure(ARGUMENTS)
    print(table([json.loads(line) for line in _lines(ARGUMENTS.output)]))
