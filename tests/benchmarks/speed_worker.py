"""One side of a measurement, in a process of its own: a line on stdin asks for a turn.

    python tests/benchmarks/speed_worker.py KIND --data FOLDER …

prepares itself, prints ``ready``, and answers each line with its images per second. Sides that
share a process would share its allocator and threads, which the job sets.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

KINDS = {
    "homework-epoch": "the homework's loop",
    "homework-step": "the homework's step on a resident batch",
    "homework-loader": "the homework's loader, from decoded images in RAM",
    "torchvision-loader": "ImageFolder, v2 transforms, DataLoader",
    "job-epoch": "an epoch of the job",
    "job-step": "the job's step on a resident batch",
    "job-step-compiled": "the job's step with --compile",
    "job-loader": "the job's loader, warm cache",
    "job-loader-files": "the job's loader, from files",
}
Turn = Callable[[], int]


def homework_turn(args: argparse.Namespace, part: str) -> Turn:
    from homework import Homework

    homework = Homework(args.data, args.device, args.size, args.images)
    if part == "epoch":
        return lambda: homework.train(homework.batches)
    if part == "loader":
        return lambda: sum(len(labels) for _, labels in homework.batches)
    images, labels = next(iter(homework.batches))
    batch = [(images.to(homework.device), labels.to(homework.device))] * args.steps
    return lambda: homework.train(batch)


def torchvision_turn(args: argparse.Namespace) -> Turn:
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    folder = args.data.parent / f"{args.data.name}-classes"
    for path in sorted((args.data / "training").iterdir())[: args.images]:
        link = folder / path.name.partition("_")[0] / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.hardlink_to(path)
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomCrop(args.size, pad_if_needed=True, padding_mode="symmetric"),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(15),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    batches = DataLoader(
        ImageFolder(str(folder), transform),
        batch_size=32,
        shuffle=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    return lambda: sum(len(labels) for _, labels in batches)


def job_turn(args: argparse.Namespace, part: str) -> Turn:
    import torch

    from job.config import PruneConfig
    from job.data.loader import iterate_batches
    from job.pipeline.image_cache import fill_cache
    from job.pipeline.setup import configure, start_up
    from job.training.session import RoundSpec, Unattended
    from job.training.trainer import TrainingRound

    config = PruneConfig(
        data=str(args.data),
        output=str(args.data / "run"),
        device=args.device,
        precision=args.precision,
        model=args.model,
        transform="homework",
        image_size=args.size,
        workers=args.workers,
        cache="off" if part == "loader-files" else "disk",
        cache_dir=None if part == "loader-files" else str(args.data / "cache"),
        compile=part == "step-compiled",
    )
    setup = start_up(configure(config))
    fill_cache(setup, args.data / "run")
    trainer, device = setup.trainer, setup.accelerator.device
    if part.startswith("loader"):

        def load() -> int:
            trainer.sampler.set_epoch(0, 0)
            return sum(len(labels) for _, labels in iterate_batches(trainer.batches, device))

        return load
    if part == "epoch":

        class Session(Unattended):
            def epoch_finished(self, result: Any) -> None:
                self.seconds = trainer.sampler.count / result.images_per_second

        def epoch() -> int:
            session = Session()
            began = time.perf_counter()
            trainer.fit(copy.deepcopy(setup.network), RoundSpec(0, 1), session)
            args.idle = time.perf_counter() - began - session.seconds  # evaluation, preparation
            return trainer.sampler.count

        return epoch
    training = TrainingRound(trainer, setup.network, RoundSpec(0, 1), Unattended())
    training.prepared.train()
    images, labels = next(iterate_batches(trainer.batches, device))
    images, labels = images.clone(), labels.clone()

    def steps() -> int:
        for number in range(args.steps):
            training.step((images, labels), len(labels), number)
        torch.get_device_module(device).synchronize()
        return args.steps * len(labels)

    steps()
    return steps


def turn_of(args: argparse.Namespace) -> Turn:
    kind, _, part = args.kind.partition("-")
    if kind == "homework":
        return homework_turn(args, part)
    return torchvision_turn(args) if kind == "torchvision" else job_turn(args, part)


def parse(argv: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--model", default="student")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int)
    return parser.parse_args(list(argv))


def main() -> None:
    args = parse(sys.argv[1:])
    if args.kind.startswith("job"):
        from job.distributed.cores import set_thread_variables

        set_thread_variables()
    answers, sys.stdout = sys.stdout, sys.stderr  # the job prints lines of its own
    args.idle = 0.0
    turn = turn_of(args)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        count = turn()
        seconds = time.perf_counter() - began - args.idle
        print(count / seconds, file=answers, flush=True)
    from job.distributed.collectives import leave

    leave()  # loader processes ignore signals


if __name__ == "__main__":
    main()
