"""Model folders and run directories of which a file is damaged or makes no sense."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from support.hostile.case import (
    DOCUMENTED,
    Args,
    Case,
    Originals,
    flips,
    linked,
    replaced,
    sparse,
    truncations,
)

BAD, MAYBE = frozenset({65}), frozenset({0, 65})
NONSENSE: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 1e308, 10**12, 10**400, float("nan"), float("inf"), "", "x",
    "\x1b[2J\n",
    [], {}, [[]], [None], {"a": {}}, "\u202e\0", [1e9] * 3,
)  # fmt: skip
REQUIRED = (
    "format", "model", "args", "num_classes", "input", "class_names", "width", "layers", "metrics",
    "lineage",
)  # fmt: skip


def use(originals: Originals, model: Path, number: int) -> Args:
    """One of the commands that read a model."""
    return (
        ("inspect", model, *(["--json"] if number % 2 else [])),
        ("evaluate", model, "--data", originals.flat, "--workers", 0),
        ("slim", model, "--output", "$OUT/slim", "--target", "width=0.5"),
        ("export", model, "--output", "$OUT/w.safetensors"),
        ("predict", model, "--data", originals.flat, "--workers", 0, "--output", "$OUT/p.csv"),
    )[number % 5]


def with_file(originals: Originals, number: int, name: str, content: bytes, folder: Path) -> Args:
    """A model folder in which the file ``name`` has ``content``, under command ``number``."""
    model = linked(originals.model, folder / "model")
    replaced(model / name, content)
    return use(originals, model, number)


def cards(rng: random.Random, card: dict[str, Any]) -> Iterator[tuple[str, bytes, frozenset[int]]]:
    """Contents of model.json: (name, content, codes)."""
    text = json.dumps(card).encode()
    for number, part in enumerate(truncations(rng, text, 5)):
        yield f"cut {number}", part, BAD
    for number, part in enumerate(flips(rng, text, 8, 2)):
        yield f"flipped {number}", part, MAYBE
    for key in REQUIRED:
        without = json.dumps({k: v for k, v in card.items() if k != key}).encode()
        yield f"no {key}", without, BAD
        for value in rng.sample(NONSENSE, 7):
            yield f"{key} {value!r:.20}", json.dumps({**card, key: value}).encode(), MAYBE
    deep: dict[str, list[Any]] = {
        "args": [{"base": v} for v in (0, -3, 10**5, 10**9, 1e3, "2", [], None, 3)]
        + [{"base": 2, "width_mult": v} for v in (float("nan"), float("inf"), -1, 1e9, 0, "a", [])]
        + [{"base": 2, "num_classes": 3}, {"nothing": 1}, {"self": 1}, {"": 1}],
        "num_classes": [4, 10**6, 10**8, 2**63],
        "class_names": [["0"], ["0", "1", "2", "3"], ["a\x1b[2J\n", "b", "c"], ["x"] * 10**5],
        "input": [{"preset": "small", "size": s} for s in (10**6, 10**12, 0, 31, True, "32", 1e300)]
        + [{"preset": p, "size": 32} for p in ([], {}, "none", None)],
        "layers": [
            {name: {side: kept}}
            for name in ("cnn.4.1", "cnn.3.3", "cnn.0.2", "fc.0", "cnn.99", "", "cnn", "\x1b[2J")
            for side, kept in (("out", [10**30]), ("out", [0, 0]), ("in", [0]),
                    ("out", [0] * 10**5))
        ],
        "width": [-1.0, 1e300],
    }  # fmt: skip
    for key, values in deep.items():
        for value in values:
            yield f"{key} {value!r:.40}", json.dumps({**card, key: value}).encode(), MAYBE
    odd = (b"", b"\0" * 99, b"[" * 10**5, b'{"a":' * 10**5, b"[]", b"null", b"1" * 5000,
            b"\xff\xfe\0",
           b"{}", b"NaN", b'{"format":1}', b'"text"', b"no json")  # fmt: skip
    for number, content in enumerate(odd):
        yield f"odd {number}", content, BAD


def model_folders(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """Model folders with a damaged card or weights, or without one of the two."""
    card = json.loads((originals.model / "model.json").read_text())
    weights = (originals.model / "model.safetensors").read_bytes()
    spoilt = [(name, "model.json", content, codes) for name, content, codes in cards(rng, card)]
    for number, part in enumerate(truncations(rng, weights, 3)):
        spoilt.append((f"weights cut {number}", "model.safetensors", part, BAD))
    for number, part in enumerate(flips(rng, weights, 4, 50)):
        spoilt.append((f"weights flipped {number}", "model.safetensors", part, MAYBE))
    for number, (name, file, content, codes) in enumerate(spoilt):
        build = partial(with_file, originals, number, file, content)
        yield Case("model folder", name, build, codes)
    makers: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "sparse": lambda path: sparse(path, 10 << 30),
        "circle of links": lambda path: path.symlink_to(path.name),
    }
    for number, (name, maker) in enumerate(makers.items()):
        for file in ("model.json", "model.safetensors"):

            def build(
                folder: Path, maker: Any = maker, file: str = file, number: int = number
            ) -> Args:
                model = linked(originals.model, folder / "model")
                (model / file).unlink()
                maker(model / file)
                return use(originals, model, number)

            yield Case("model folder", f"{file} {name}", build, frozenset({65, 66}))


def spoil_run(originals: Originals, spoil: Callable[[Path], object], folder: Path) -> Path:
    """A copy of the finished run, changed by ``spoil``."""
    run = Path(shutil.copytree(originals.run, folder / "run"))
    spoil(run)
    return run


def write(name: str, content: bytes) -> Callable[[Path], object]:
    """Put ``content`` at ``name`` in a run."""
    return lambda run: replaced(run / name, content)


def changed(name: str, **values: Any) -> Callable[[Path], object]:
    """Set keys of a JSON file of a run."""

    def change(run: Path) -> None:
        path = run / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def both(*spoils: Callable[[Path], object]) -> Callable[[Path], object]:
    """One change after another."""

    def change(run: Path) -> None:
        for spoil in spoils:
            spoil(run)

    return change


def unfinished(run: Path) -> None:
    """Take back the end of a run: its last round, and its summary's word for it."""
    shutil.rmtree(run / "rounds" / "01")
    changed("summary.json", state="running")(run)


def position(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the newest position of a run, its manifest with it, as if it had been saved so."""

    def spoil(run: Path) -> None:
        unfinished(run)
        place = sorted((run / "checkpoints").iterdir())[-1]
        values = json.loads((place / "position.json").read_text())
        change(values)
        content = json.dumps(values).encode()
        (place / "position.json").write_bytes(content)
        manifest = json.loads((place / "manifest.json").read_text())
        sha256 = hashlib.sha256(content).hexdigest()
        manifest["position.json"] = {"size": len(content), "sha256": sha256}
        (place / "manifest.json").write_text(json.dumps(manifest))

    return spoil


def summaries(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What the summary may say: it leads ``inspect`` and others to the recommended model."""
    for value in ("", ".", "..", "/", "../../..", "rounds/99", "rounds/01\0", "\x1b[2J\n",
            "x" * 300,
                  "/dev/zero", None, 3, [], "rounds"):  # fmt: skip
        yield f"recommends {value!r:.20}", changed("summary.json", recommended=value)
    for value in (None, "x", [], float("nan"), -1):
        yield f"seconds {value}", changed("summary.json", seconds=value)
    for number, content in enumerate(
        (
            b"",
            b"[]",
            b"{",
            b"[" * 10**5,
            b'{"a":' * 10**5,
            b"null",
            b"\xff",
            b"1" * 5000,
            b'"finished"',
        )
    ):
        yield f"summary {number}", write("summary.json", content)
    yield "sparse summary", lambda run: sparse(run / "summary.json", 10 << 30)


def run_files(rng: random.Random, config: bytes) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What a resumed run may find in its directory."""
    yield from summaries(rng)
    for number, part in enumerate(truncations(rng, config, 4)):
        yield f"config cut {number}", write("config.toml", part)
    for number, part in enumerate(flips(rng, config, 5, 3)):
        yield f"config flipped {number}", write("config.toml", part)
    odd = (b"", b"\xff\xfe", b"a = " + b"[" * 10**5, b"prune = 3", b"dataset = 3", b"base = 3",
           b"prune = []\ndataset = []", b"a = " + b"9" * 9999, b"[prune]\nrate = nan",
           b"\0")  # fmt: skip
    for number, content in enumerate(odd):
        yield f"config {number}", write("config.toml", content)
    yield "sparse config", lambda run: sparse(run / "config.toml", 10 << 30)
    lines = (b"\xff" * 99, b"[" * 10**5, b"\n" * 999, b"\x1b[2J", b"", b"{}", b'{"event": "round"')
    for number, content in enumerate(lines):
        yield f"metrics {number}", both(unfinished, write("metrics.jsonl", content))
        yield f"metrics of the finished {number}", write("metrics.jsonl", content)
    yield "sparse metrics", both(unfinished, lambda run: sparse(run / "metrics.jsonl", 10 << 30))
    for number, content in enumerate((b"", b"[]", b"\xff", b"{")):
        yield f"status {number}", write("status.json", content)
    for key, value in (("metrics", {}), ("metrics", {"round": "x", "step": None}), ("metrics", []),
                       ("width", float("nan")), ("args", {"base": 3}),
                       ("lineage", {})):  # fmt: skip
        yield f"base {key} {value}", changed("rounds/00/model.json", **{key: value})
        yield (
            f"resumed base {key} {value}",
            both(unfinished, changed("rounds/00/model.json", **{key: value})),
        )
    for key, value in (("valid_acc", "x"), ("valid_acc", None), ("params", "many"), ("round", 7),
                       ("round", 10**9), ("step", "x"), ("width", [])):  # fmt: skip
        yield f"base says {key} {value}", both(unfinished, partial(say_of_base, key, value))
    yield "no metrics of round 1", changed("rounds/01/model.json", metrics={})
    yield "round 0 gone", lambda run: shutil.rmtree(run / "rounds" / "00")
    yield "rounds a file", both(lambda run: shutil.rmtree(run / "rounds"), write("rounds", b""))
    yield from checkpoints(rng)


def say_of_base(key: str, value: Any, run: Path) -> None:
    """Change one number of the base's metrics."""
    path = run / "rounds" / "00" / "model.json"
    card = json.loads(path.read_text())
    card["metrics"][key] = value
    path.write_text(json.dumps(card))


def checkpoints(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Positions that are damaged, or whole and nonsense."""
    for name in ("state.safetensors", "position.json", "manifest.json"):
        for number, content in enumerate((b"", b"[]", b"{}", rng.randbytes(99), b"[" * 10**5)):

            def spoil(run: Path, name: str = name, content: bytes = content) -> None:
                for place in (run / "checkpoints").iterdir():
                    (place / name).write_bytes(content)

            yield f"{name} {number}", both(unfinished, spoil)
    for key in ("round", "epoch", "batch", "values"):
        for value in (None, "x", -5, 10**9, [], {}):
            yield (
                f"position {key} {value}",
                position(
                    lambda values, key=key, value=value: values.update({key: value})  # type: ignore[misc]
                ),
            )
    yield "position of nothing", position(lambda values: values.clear())
    yield "position with more", position(lambda values: values.update(more=1))
    for key in ("scores", "metrics_size", "round_seconds", "run_seconds", "processes"):
        yield (
            f"position without {key}",
            position(lambda values, key=key: values["values"].pop(key)),  # type: ignore[misc]
        )
        yield (
            f"position's {key} odd",
            position(
                lambda values, key=key: values["values"].update({key: "\x1b[2J"})  # type: ignore[misc]
            ),
        )
    for name in ("x", "000-0000", "001-0000-0000009", "001-9999-9999999", "\x1b[2J\n", "a" * 255):
        yield (
            f"checkpoint {name[:20]!r}",
            both(
                unfinished,
                lambda run, name=name: (run / "checkpoints" / name).mkdir(),  # type: ignore[misc]
            ),
        )
    yield (
        "checkpoints a file",
        both(
            unfinished, lambda run: shutil.rmtree(run / "checkpoints"), write("checkpoints", b"x")
        ),
    )
    yield "STOP a folder", both(unfinished, lambda run: (run / "STOP").mkdir())


def runs(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """Damaged run directories, shown and resumed."""
    config = (originals.run / "config.toml").read_bytes()
    for name, spoil in run_files(rng, config):

        def resume(folder: Path, spoil: Callable[[Path], object] = spoil) -> Args:
            return originals.prune(originals.flat, spoil_run(originals, spoil, folder))

        yield Case("resumed run", name, resume, DOCUMENTED, resumes=True)
    for number, (name, spoil) in enumerate(summaries(rng)):

        def read(
            folder: Path, spoil: Callable[[Path], object] = spoil, number: int = number
        ) -> Args:
            return use(originals, spoil_run(originals, spoil, folder), number)

        codes = DOCUMENTED if name.startswith("seconds") else frozenset({65, 66})
        yield Case("shown run", name, read, codes)
