"""Configuration files, variables, command lines and file names that make no sense."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from support.hostile.case import Args, Case, Originals, linked, replaced, score, sparse
from support.hostile.images import encoded, noise

USAGE, CONFIG, EITHER = frozenset({2}), frozenset({78}), frozenset({2, 65, 66, 73, 78})
NAMES = (
    "new\nline", "\x1b[31mred\x1b[2J", "carriage\rreturn", "\x07bell\x08", "invalid \udcff\udcfe",
    "-leading", "--rate=2", "'quotes\"", "$(touch executed)", "`touch executed`", "; rm -rf x",
    "\u202egpj.exe", "\u2028line", "\x85next", "é" * 120, "x" * 240, " space ", "*", "~", "%s%n{0}",
    "[red]", "back\\slash", "\x9b2J", "\U0001f600", "tab\t", "null", ".", "..",
)  # fmt: skip


def toml(text: bytes, command: Args, folder: Path) -> Args:
    """A command with ``text`` as its --config."""
    path = replaced(folder / "my.toml", text)
    return (*command, "--config", path)


def tomls(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """TOML that is none, has wrong types or unknown keys, or holds far too much."""
    wrong = [
        "rate = ", "= 3", "rate 0.9", "[prune", "[[prune]]", "rate = 0.9\nrate = 0.8", "a.b.c = 3",
        'rate = "\\q"', "rate = 'x\ny'", "rate = {", "rate = 0.9 0.8", "\x00", "\ufeffrate = ?",
        "rate = [1, 2]", "rate = {a = 1}", "rate = true", "rate = 'fast'", "rate = nan",
        "rate = inf",
        "rate = -inf", "rate = -1", "rate = 1e400", "rate = 1979-05-27", "rate = ''", "seed = -1",
        "seed = 1.5", "seed = 99999999999999999999999", f"seed = {'9' * 6000}",
        "seed = 0x" + "f" * 99,
        "rounds = -1", "rounds = 'x'", "rounds = [[[[]]]]", "epochs = 0", "batch_size = 0",
        "batch-size = -5", "model = 3", "model = ''", "model = 'resnet'", "model = '\\u001b[2J'",
        "model_arg = 3", "model_arg = ['base']", "model_arg = ['=3']", "model_arg = 'base=2'",
        "model_arg = [3]", "model_arg = [['base', 2]]", "model_arg = ['base=nan']",
        "model_arg = {a=1}",
        "model_arg = ['base=100000']", "model_arg = ['width_mult=1e9']",
        "model_arg = ['nothing=1']",
        "data = 3", "data = ''", "data = []", "data = '\\u0000'", 'data = "a\\u0000b"',
        "data = true",
        'output = "a\\u0000b"', 'weights = "a\\u0000b"', 'data = "\\u001b[2J\\n"', "weights = 7.5",
        "output = ''", "dry_run = 'maybe'", "dry_run = 3", "wandb = 'never'", "resume = 3",
        "lr = 0", "lr = 'x'", "weight_decay = -1", "image_size = 8", "image_size = 10000000",
        "image_size = 4611686018427387904", "num_classes = 1", "num_classes = 5000000",
        "num_classes = 4611686018427387904", "workers = -1", "checkpoint_every = nan",
        "schedule = 'x'", "optimizer = 'x'", "policy = 'x'", "transform = 'x'", "device = 'tpu'",
        "precision = 'fp8'", "rats = 0.9", "[prun]\nrate = 1", "[prune.more]\na = 1", "prune = []",
        "'\\u001b[2J' = 3", "\"\\u001b[2J\\n\" = 3", "'' = 3", "[\"\\u001b[2J\\n\"]\na = 3",
        "rate = " + "[" * 10**5, "a = " + "{a = " * 10**4, ".".join("a" * 3000) + " = 1",
        "[" + ".".join("a" * 3000) + "]", "debug = true", "config = 'demo'", "help = true",
    ]  # fmt: skip
    command = ("prune", "--dry-run")
    for number, text in enumerate(wrong):
        build = partial(toml, text.encode(), command)
        yield Case("TOML", f"{number} {text!r:.30}", build, EITHER)
    for number, text in enumerate((b"\xff\xfe\0", rng.randbytes(400), b"rate = '\xe9'", bytes(99))):
        yield Case("TOML", f"bytes {number}", partial(toml, text, command), CONFIG)
    for name in ("evaluate", "predict", "inspect", "slim", "export"):
        more = () if name in ("evaluate", "inspect") else ("--output", "$OUT/x")
        for text in (
            "image_size = 'x'",
            "num_classes = []",
            "nothing = 1",
            "path = 'x'",
            "a = [" * 9999,
        ):
            build = partial(toml, text.encode(), (name, originals.model, *more))
            yield Case("TOML", f"{name} {text[:20]}", build, CONFIG)
    makers: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "sparse": lambda path: sparse(path, 10 << 30),
        "circle of links": lambda path: path.symlink_to(path.name),
    }
    for name, maker in makers.items():

        def build(folder: Path, maker: Any = maker) -> Args:
            maker(folder / "my.toml")
            return ("prune", "--dry-run", "--config", folder / "my.toml")

        yield Case("TOML", name, build, frozenset({66, 78}))


def variables(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """GAMMASLIM_PRUNE_… variables with values that no option takes."""
    values = ("nan", "-1", "1e999", "x", "\x1b[2J\n", "\udcff", "9" * 5000, "１x", " ", "0x1")
    options = ("RATE", "ROUNDS", "EPOCHS", "LR", "SEED", "BATCH_SIZE", "NUM_CLASSES", "IMAGE_SIZE",
               "WORKERS", "RESUME", "WANDB", "TRANSFORM", "DEVICE", "MODEL", "MODEL_ARG", "DATA",
               "WEIGHTS", "CONFIG", "DRY_RUN", "CHECKPOINT_EVERY")  # fmt: skip
    for number, option in enumerate(options):
        for value in (
            values[number % 10],
            values[(number * 3 + 1) % 10],
            values[(number + 5) % 10],
        ):
            env = {f"GAMMASLIM_PRUNE_{option}": value}
            # the command line wins over DRY_RUN
            codes = EITHER if value != " " and option != "DRY_RUN" else EITHER | {0}
            yield Case(
                "variable", f"{option}={value!r:.12}", lambda _: ("prune", "--dry-run"), codes, env
            )
    for name in ("RATES", "ROUND", "\x1b[2JRATE", "RATE\n", "rate"):
        env = {f"GAMMASLIM_PRUNE_{name}": "0.9"}
        yield Case(
            "variable", f"named {name!r}", lambda _: ("prune", "--dry-run"), CONFIG | {0}, env
        )
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "OMP_NUM_THREADS",
            "MASTER_PORT",
                 "ACCELERATE_MIXED_PRECISION", "CUDA_VISIBLE_DEVICES", "COLUMNS"):  # fmt: skip
        args = ("evaluate", originals.model, "--data", originals.flat)
        codes = EITHER | {0}
        yield Case(
            "variable", f"{name} of others", lambda _, a=args: a, codes, {name: "nonsense\n"}
        )  # type: ignore[misc]


def command_lines(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """Options with values that are none, in every command."""
    odd = (
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e400",
        "",
        "x",
        "٣x",
        "\x1b[2J\n",
        "\udcff",
        "9" * 5000,
    )
    numbers = ("--rate", "--rounds", "--epochs", "--lr", "--seed", "--batch-size", "--num-classes",
               "--image-size", "--workers", "--weight-decay", "--base-epochs",
               "--checkpoint-every")  # fmt: skip
    for number, option in enumerate(numbers):
        for value in (odd[number % 12], odd[(number + 5) % 12], odd[(number * 7 + 3) % 12]):
            args = ("prune", "--dry-run", f"{option}={value}")
            codes = frozenset({0, 2}) if value == "0" else USAGE
            yield Case("command line", f"{option}={value!r:.12}", lambda _, a=args: a, codes)  # type: ignore[misc]
    model, flat = originals.model, originals.flat
    others: tuple[tuple[object, ...], ...] = (
        ("\x1b[2J\n",), ("--\x1b[2J\n",), ("prun",), ("\udcff",), ("",), ("prune", "\x1b[2J\n"),
        ("prune", "--\x1b[2J\n"), ("prune", "--rat\udcff=3"), ("prune", "--rate"),
        ("prune", "--model", ""),
        ("prune", "--model", "\x1b[2J\n", "--dry-run"),
        ("prune", "--model-arg", "\x1b[2J\n=3", "--dry-run"),
        ("prune", "--model-arg", "base=4000", "--dry-run"),
        ("prune", "--model-arg", "base=-4", "--dry-run"),
        ("prune", "--model-arg", "base=1e5", "--dry-run"),
        ("prune", "--model-arg", "a.b=1", "--dry-run"),
        ("prune", "--model-arg", "width_mult=1e6", "--dry-run"),
        ("prune", "--model-arg", "width_mult=" + "9" * 400, "--dry-run"),
        ("prune", "--num-classes", 10**7, "--dry-run"),
        ("prune", "--num-classes", 10**18, "--dry-run"),
        ("prune", "--num-classes", 10**5, "--base-epochs", 0, "--rounds", 0, "--wandb", "off"),
        ("prune", "--image-size", 10**6, "--dry-run"),
        ("prune", "--image-size", 10**18, "--dry-run"),
        ("prune", "--image-size", 10**5, "--base-epochs", 1, "--wandb", "off"),
        ("prune", "--data", "\x1b[2J\n"),
        ("prune", "--data", "\udcff"), ("prune", "--weights", "\x1b[2J\n"),
        ("prune", "--config", "\x1b[2J\n"),
        ("prune", "--config", ""), ("prune", "--config", "/"),
        ("prune", "--output", "/dev/null/\x1b[2J\n"),
        ("evaluate",), ("evaluate", ""), ("evaluate", "\x1b[2J\n"), ("evaluate", "\udcff"),
        ("evaluate", "/"),
        ("evaluate", "x" * 5000), ("evaluate", "/".join("a" * 3000)),
        ("evaluate", model, "--data", ""),
        ("evaluate", model, "--data", flat, "--image-size", 10**6),
        ("evaluate", model, "--data", flat, "--image-size", 30_000),
        ("evaluate", model, "--data", flat, "--image-size", 10**18),
        ("evaluate", model, "--split", "x"),
        ("evaluate", model, "--data", flat, "--seed", -1), ("evaluate", model, model),
        ("inspect", model, "--image-size", 10**9), ("inspect", model, "--image-size", 10**18),
        ("inspect", model, "--num-classes", 0), ("inspect", "/dev/zero", "--model", "student"),
        ("inspect", "/dev/null"), ("inspect", "/proc/self/mem", "--model", "student"),
        ("slim", model, "--output", ""), ("slim", model, "--output", "/"),
        ("slim", model, "--output", "/dev/null"),
        ("slim", model, "--output", "$OUT/x", "--target", "width=1e-9"),
        ("slim", model, "--output", "$OUT/x", "--target", "\x1b[2J\n"),
        ("slim", model, "--output", "$OUT/x", "--target", "width=" + "9" * 999),
        ("slim", model, "--output", "$OUT/x", "--target", "width=0.5", "--image-size", 30_000),
        ("slim", model, "--output", "x" * 300), ("slim", model, "--output", "/proc/x"),
        ("export", model, "--output", ""), ("export", model, "--output", "/"),
        ("export", model, "--output", "/dev/full"), ("export", model, "--output", "/proc/x"),
        ("export", model, "--output", "x" * 300), ("export", model, "--output", "/dev/null/x"),
        ("export", model, "--output", "x", "--format", "\x1b[2J\n"),
        ("predict", model, "--output", ""),
        ("predict", model, "--data", flat, "--output", "/dev/full"),
        ("predict", model, "--data", flat, "--output", "y" * 300),
        ("predict", model, "--output", "/"),
    )  # fmt: skip
    for number, args in enumerate(others):
        yield Case("command line", f"{number} {args!r:.70}", lambda _, a=args: a, EITHER | {74})  # type: ignore[misc]


def names(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """Hostile names of images, classes, data sets, weights, outputs, models."""
    image, text = encoded(noise(), "PNG"), b"no image"
    for number, name in enumerate(NAMES[:-2]):

        def flat(folder: Path, name: str = name, content: bytes = text) -> Args:
            data = linked(originals.flat, folder / "data")
            replaced(data / "training" / f"1_{name}.png", content)
            return score(originals, data, 0)

        yield Case("name", f"image {name!r:.20}", flat, frozenset({65}))

        def skipped(folder: Path, name: str = name) -> Args:
            return (*flat(folder, name), "--on-bad-image", "skip")

        if number % 3 == 0:
            yield Case("name", f"skipped {name!r:.20}", skipped, frozenset({0}))

        def classes(folder: Path, name: str = name) -> Args:
            data = linked(originals.classes, folder / "data")
            for split in ("train", "val"):
                (data / split / "2").rename(data / split / name)
            replaced(data / "val" / f"{name}2" / "0.png", image)
            return ("evaluate", originals.model, "--data", data, "--workers", 0)

        yield Case("name", f"class {name!r:.20}", classes, frozenset({65}))

        def trained(folder: Path, name: str = name) -> Args:
            data = folder / name
            linked(originals.classes, data)
            for split in ("train", "val", "test"):
                (data / split / "2").rename(data / split / f"_{name[:200]}")
            return originals.prune(data, Path(f"$OUT/{name}"))

        if number % 5 == 0:
            yield Case("name", f"trained {name!r:.20}", trained, frozenset({0}))

        def model(folder: Path, name: str = name) -> Args:
            place = linked(originals.model, folder / name)
            replaced(place / "model.json", b"{}")
            return ("inspect", place)

        yield Case("name", f"model {name!r:.20}", model, frozenset({65}))

        def weights(folder: Path, name: str = name) -> Args:
            path = folder / f"{name}.pt"
            shutil.copy(originals.model / "model.json", path)
            data = ("--data", originals.flat, "--dry-run")
            return ("prune", f"--weights={path}", *data, f"--output=$OUT/{name}")

        yield Case("name", f"weights {name!r:.20}", weights, frozenset({65}))
    for name in NAMES:

        def config(folder: Path, name: str = name) -> Args:
            return (
                "prune",
                "--dry-run",
                f"--config={replaced(folder / 'c' / f'{name}.toml', b'=')}",
            )

        yield Case("name", f"config {name!r:.20}", config, CONFIG)

        blocked = partial(file_in_the_way, originals, name)
        if name not in (".", ".."):
            yield Case("name", f"output {name!r:.20}", blocked, frozenset({73}))


def file_in_the_way(originals: Originals, name: str, folder: Path) -> Args:
    """An output below something that is a file."""
    path = folder / f"file {name}"
    path.touch()
    return ("export", originals.model, "--format=state-dict", f"--output={path / name}")
