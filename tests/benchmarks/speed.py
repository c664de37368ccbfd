"""Speed and memory of the job, each a command that prints a table and writes JSON.

    python tests/benchmarks/speed.py epoch     an epoch, against the homework's loop and our step
    python tests/benchmarks/speed.py loader    the loader alone, against two others
    python tests/benchmarks/speed.py step      a step on a resident batch
    python tests/benchmarks/speed.py start     seconds to the first step: new, warm cache, resumed
    python tests/benchmarks/speed.py memory    peak memory of all processes, by number of images
    python tests/benchmarks/speed.py cut       seconds of a default cut

Images are generated, 512 x 490 pixels. The sides of a comparison take turns, each in a process of
its own: medians of ``--turns``, after one turn that is not counted. The machine should be idle.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conditions import conditions, publish
from photos import write_photos
from process_tree import measure
from speed_worker import KINDS

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]


class Side:
    """A process that measures one side; see speed_worker.py."""

    def __init__(self, kind: str, data: Path, args: argparse.Namespace) -> None:
        options: dict[str, Any] = {
            "data": data, "device": args.device, "precision": args.precision, "model": args.model,
            "size": args.size, "images": args.images, "steps": args.steps, "workers": args.workers,
        }  # fmt: skip
        given = [f"--{key}={value}" for key, value in options.items() if value is not None]
        self.kind, self.speeds = kind, list[float]()
        self.process = subprocess.Popen(
            [sys.executable, HERE / "speed_worker.py", kind, *given],
            env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self.kind} ended with code {self.process.wait()}")
        return line

    def turn(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        self.speeds.append(float(self._answer()))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def environ() -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}


def compare(kinds: Sequence[str], data: Path, args: argparse.Namespace) -> Rows:
    """Medians of alternating turns, and their ratios to the first kind's."""
    with ExitStack() as stack:
        sides = []
        for kind in kinds:
            sides.append(Side(kind, data, args))
            stack.callback(sides[-1].close)
        for _ in range(args.turns + 1):
            for side in sides:
                side.turn()
    rows: Rows = []
    for side in sides:
        median = statistics.median(side.speeds[1:])
        first = rows[0]["images/s"] if rows else median
        rows.append({"what": KINDS[side.kind], "images/s": median, "ratio": median / first})
    return rows


def photos(folder: Path, args: argparse.Namespace) -> Path:
    return write_photos(folder / "photos", args.images, 32)


def epoch(folder: Path, args: argparse.Namespace) -> Rows:
    rows = compare(("homework-epoch", "job-epoch", "job-step"), photos(folder, args), args)
    rows[1]["of our step"] = rows[1]["images/s"] / rows[2]["images/s"]
    return rows


def loader(folder: Path, args: argparse.Namespace) -> Rows:
    args.workers = args.workers or max(1, len(os.sched_getaffinity(0)))
    kinds = ("homework-loader", "torchvision-loader", "job-loader-files", "job-loader")
    return compare(kinds, photos(folder, args), args)


def step(folder: Path, args: argparse.Namespace) -> Rows:
    compiled = ("job-step-compiled",) if args.compile else ()
    return compare(("homework-step", "job-step", *compiled), photos(folder, args), args)


def prune(data: Path, run: Path, args: argparse.Namespace, *more: object) -> list[str]:
    """The arguments of a run on the photographs, with its cache next to them."""
    fixed = ("--transform", "homework", "--image-size", args.size, "--model", args.model)
    place = ("--cache", "disk", "--cache-dir", data / "cache", "--device", args.device)
    quiet = ("--precision", args.precision, "--wandb", "off")
    return ["prune", "--data", *map(str, (data, "--output", run, *fixed, *place, *quiet, *more))]


def start(folder: Path, args: argparse.Namespace) -> Rows:
    data, rows = photos(folder, args), []
    turns = {"cold cache": [], "warm cache": [], "resumed": []}  # type: dict[str, list[float]]
    for turn in range(args.turns):
        for name, seconds in turns.items():
            run = folder / ("a" if name == "cold cache" else f"b{turn}")
            if name == "cold cache" and turn:
                continue
            note = folder / "note"
            command = [sys.executable, HERE / "start_worker.py", note, run / "STOP"]
            began = time.time()
            done = subprocess.run(
                [*map(str, command), *prune(data, run, args)],
                env=environ(), stdout=subprocess.DEVNULL, check=False,
            )  # fmt: skip
            if done.returncode != 75:
                raise SystemExit(f"the run ended with code {done.returncode}")
            seconds.append(float(note.read_text()) - began)
    for name, seconds in turns.items():
        rows.append({"run": name, "seconds to the first step": statistics.median(seconds)})
    return rows


def memory(folder: Path, args: argparse.Namespace) -> Rows:
    short = ("--base-epochs", 2, "--rounds", 2, "--epochs", 1, "--calibration-images", 32)
    cases: list[tuple[str, list[str]]] = []
    for count in args.counts:
        data = write_photos(folder / str(count), count, 32)
        cases.append((f"{count:,} photographs", prune(data, folder / f"run{count}", args, *short)))
    if args.builtin:
        built_in = ["prune", "--output", str(folder / "default"), *map(str, short[:6])]
        cases.append(("built-in data", built_in))
    rows = []
    for name, command in cases:
        used = measure([sys.executable, "-m", "job", *command], environ())
        if used.code:
            raise SystemExit(f"the run on {name} ended with code {used.code}")
        size = {"GB of all processes": used.peak / 1e9, "GB of the largest": used.largest / 1e9}
        rows.append({"run": name, **size, "seconds": used.seconds})
    return rows


def _seconds_of_forward_pass(network: Any, batches: Iterable[Any]) -> float:
    """Seconds in which a network computes its outputs for all calibration images."""
    import torch

    began = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            float(network(batch).sum())  # waits for the device
    return time.perf_counter() - began


def cut(folder: Path, args: argparse.Namespace) -> Rows:
    """Seconds of `slim` with calibration images, from the analysis to the proof."""
    import torch
    import torchvision

    import job

    rows = []
    for name in args.networks:
        torch.manual_seed(0)
        network = getattr(torchvision.models, name)(weights=None).eval().to(args.device)
        images = torch.rand(args.calibration, 3, args.pixels, args.pixels, device=args.device)
        batches = list(images.split(32))
        forward = _seconds_of_forward_pass(network, batches)
        for importance in ("gamma", None):
            more = {"importance": "gamma", "compensate": "none"} if importance else {}
            began = time.perf_counter()
            _, plan = job.slim(network, images[:1], target="macs=0.5", calibration=batches, **more)
            took, method = time.perf_counter() - began, importance or "default"
            after, before = plan.after.macs, plan.before.macs
            row = {"network": name, "cut": method, "seconds": took, "MACs": after / before}
            rows.append({**row, "forward pass": forward, "forward passes": took / forward})
    return rows


COMMANDS = {each.__name__: each for each in (epoch, loader, step, start, memory, cut)}
TITLES = {
    "epoch": "Training, batches of 32",
    "loader": "Loader alone, batches of 32",
    "step": "A step on a resident batch of 32",
    "start": "From the command to the first training step",
    "memory": "Peak memory (PSS) of a run with two rounds",
    "cut": "One cut to half the MACs",
}


def parse(argv: Iterable[str] | None = None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--model", default="student")
    parser.add_argument("--size", type=int, default=256, help="side of the inputs, in pixels")
    parser.add_argument("--images", type=int, default=320, help="training images of an epoch")
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--compile", action="store_true", help="step: with --compile too")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000], help="memory")
    parser.add_argument("--no-builtin", dest="builtin", action="store_false", help="memory")
    parser.add_argument("--networks", nargs="+", default=["resnet50"], help="cut")
    parser.add_argument("--calibration", type=int, default=128, help="cut: images")
    parser.add_argument("--pixels", type=int, default=224, help="cut: side of the images")
    parser.add_argument("--folder", type=Path, help="where images are kept; else a temporary one")
    parser.add_argument("--output", type=Path, help="JSON file; default speed-COMMAND.json")
    return parser.parse_args(argv)


def main(argv: Iterable[str] | None = None) -> None:
    args = parse(argv)
    found = conditions(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        rows = COMMANDS[args.command](args.folder or Path(temporary), args)
    output = args.output or Path(f"speed-{args.command}.json")
    publish(TITLES[args.command], rows, found, output)


if __name__ == "__main__":
    main()
