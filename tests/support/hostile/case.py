"""A case: what to write, the command line that meets it, and the exit codes that may follow."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from job.artifacts.model_card import ModelCard, save_model
from job.data.preprocessing import Preprocessing
from job.models.factory import build_network
from support.commands import gammaslim
from support.cuts import randomise
from support.datasets import write_flat, write_noise_idx

DOCUMENTED = frozenset({0, 2, 65, 66, 73, 74, 75, 78})
SMALL = {"base": 2}  # a StudentNet of 2 to 32 channels

Args = Sequence[object]


@dataclass(frozen=True)
class Originals:
    """What the cases spoil copies of. Images of three classes, a model, a finished run."""

    flat: Path
    classes: Path
    idx: Path
    model: Path
    run: Path

    @classmethod
    def make(cls, root: Path) -> Originals:
        """Write them all below ``root``."""
        flat = write_flat(root / "flat", {"training": 2, "validation": 1}, size=32)
        shutil.copytree(flat / "validation", flat / "testing")
        classes = root / "classes"
        for split in ("train", "val", "test"):
            for name in ("0", "1", "2"):
                (classes / split / name).mkdir(parents=True)
                shutil.copy(flat / "training" / f"{name}_0.png", classes / split / name)
        for name in ("0", "1", "2"):  # a class of training keeps one when a tenth is held out
            shutil.copy(flat / "training" / f"{name}_1.png", classes / "train" / name)
        idx = write_noise_idx(root / "idx", 6, 3, classes=3)
        network = randomise(build_network("student", 3, SMALL))
        card = ModelCard(
            "student",
            SMALL,
            3,
            preprocessing=Preprocessing.of("small", 32),
            class_names=("0", "1", "2"),
        )
        save_model(root / "model", network, card)
        originals = cls(flat, classes, idx, root / "model", root / "run")
        done = gammaslim(*originals.prune(flat, originals.run))
        assert done.code == 0, done
        return originals

    @staticmethod
    def prune(data: Path, output: Path) -> Args:
        """The command that made ``run``; with another output a spoilt copy of it."""
        return (
            "prune", "--data", data, "--output", output, "--model-arg", "base=2",
            "--base-epochs", 1, "--rounds", 1, "--rate", 0.6, "--epochs", 1, "--batch-size", 3,
            "--workers", 0, "--wandb", "off",
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """``build`` writes the input into a new folder and returns the command line.

    ``$OUT`` in that is a folder for output beside it. ``codes``: what the command may end with.
    ``resumes``: the input is a run directory, which the command may go on with.
    """

    kind: str
    name: str
    build: Callable[[Path], Args]
    codes: frozenset[int] = DOCUMENTED
    env: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are links: cheap, and a command that writes one is seen."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replaced(path: Path, content: bytes) -> Path:
    """``content`` at ``path``, in place of a link to an original."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def truncations(rng: random.Random, content: bytes, count: int, most: float = 0.9) -> list[bytes]:
    """``content`` cut at ``count`` places before ``most`` of its length."""
    return [content[: rng.randrange(1, int(len(content) * most))] for _ in range(count)]


def flips(rng: random.Random, content: bytes, count: int, bits: int) -> Iterator[bytes]:
    """``count`` copies with ``bits`` random bits turned over."""
    for _ in range(count):
        spoilt = bytearray(content)
        for _ in range(bits):
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        yield bytes(spoilt)


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """A file of ``size`` bytes that takes no room on the disk: ``start``, then zeros."""
    replaced(path, start)
    os.truncate(path, size)
    return path


def score(originals: Originals, data: Path, command: int, *more: object) -> Args:
    """One of three commands that read a split each: training, validation, testing."""
    if command == 0:
        plan = ("--model-arg", "base=2", "--rounds", 1)
        return ("prune", "--data", data, "--dry-run", *plan, *more)
    use = ("--data", data, "--workers", 0, *more)
    if command == 1:
        return ("evaluate", originals.model, *use)
    return ("predict", originals.model, *use, "--output", "$OUT/p.csv")
