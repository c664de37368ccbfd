"""Weights files that are damaged, lie, hold code, unpack to far too much, or are no files."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from support.hostile.case import SMALL, Args, Case, Originals, flips, replaced, sparse, truncations

BAD, MAYBE = frozenset({65}), frozenset({0, 65})
BY_NAME = (
    "--model",
    "student",
    *(p for k, v in SMALL.items() for p in ("--model-arg", f"{k}={v}")),
)


class Code:
    """A pickle of this runs a command when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def use(originals: Originals, weights: object, number: int) -> Args:
    """One of the commands that read a weights file."""
    data = ("--data", originals.flat)
    return (
        ("inspect", weights, *BY_NAME),
        ("prune", "--weights", weights, *BY_NAME, *data, "--dry-run"),
        ("evaluate", weights, *BY_NAME, *data, "--workers", 0),
        ("export", weights, *BY_NAME, "--output", "$OUT/w.pt"),
        ("slim", weights, *BY_NAME, "--output", "$OUT/slim", "--target", "width=0.6"),
        ("predict", weights, *BY_NAME, *data, "--workers", 0, "--output", "$OUT/p.csv"),
    )[number % 6]


def torch_file(state: object, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def headers(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Safetensors with headers that lie or are none."""
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for claimed in (
        0,
        1,
        2,
        length - 1,
        length + 1,
        len(whole),
        10**8,
        10**8 + 1,
        2**63,
        2**64 - 1,
    ):
        yield f"length {claimed}", struct.pack("<Q", claimed) + whole[8:]

    def rebuilt(text: bytes, rest: bytes = body) -> bytes:
        return struct.pack("<Q", len(text)) + text + rest

    texts = [
        b"", b"{}", b"[]", b"null", b"7", b'"x"', b"{" * 9999, b"[" * 99999, b'{"a":' * 50000,
        b'{"a":{}}', b"\xff\xfe", b'{"a":1}', b"{\0}", b'{"a":{"dtype":"F32","shape":[-1]}}',
        b'{"__metadata__":7}', b" " * 5000,
    ]  # fmt: skip
    for number, text in enumerate(texts):
        yield f"header {number}", rebuilt(text)
    key = "cnn.3.1.weight"
    changes: list[tuple[str, Any]] = [
        ("dtype", value) for value in ("F16", "BF16", "I64", "F8_E4M3", "C64", "F4", "", 3, None)
    ]
    changes += [
        ("shape", value)
        for value in ([], [1], [2**62], [2**32, 2**32], [-8], [1.5], "8", [0], [4, 4], [8] * 200)
    ]
    changes += [
        ("data_offsets", value)
        for value in (
            [0, 0],
            [0, 64],
            [64, 0],
            [-1, 64],
            [2**62, 2**63],
            [0],
            "x",
            [0, len(body) + 64],
        )
    ]
    for field, value in changes:
        spoilt = {name: dict(entry) for name, entry in header.items()}
        spoilt[key][field] = value
        yield f"{field} {value}"[:40], rebuilt(json.dumps(spoilt).encode())
    yield "trailing bytes", whole + b"more"
    yield "escape in a key", rebuilt(json.dumps({**header, "\x1b[2J\n\r": header[key]}).encode())
    one = {"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    yield "key of 100,000 letters", rebuilt(json.dumps({"x" * 100_000: one["x"]}).encode(), b"")


def states(whole: dict[str, torch.Tensor]) -> Iterator[tuple[str, Any]]:
    """Objects that torch.save takes but that are no state dict of the network."""
    first = "cnn.3.1.weight"
    values: dict[str, Any] = {
        "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 1e38,
    }  # fmt: skip
    for name, value in values.items():
        yield name, {**whole, first: torch.full_like(whole[first], value)}
    variance = "cnn.3.1.running_var"
    yield "negative variance", {**whole, variance: -whole[variance]}
    yield "complex", {**whole, first: whole[first].to(torch.complex64)}
    yield "integers", {**whole, first: whole[first].to(torch.int64)}
    yield "booleans", {**whole, first: whole[first] > 0}
    yield "scalar", {**whole, first: torch.tensor(1.0)}
    yield "expanded", {**whole, first: torch.zeros(1).expand(2**40)}
    yield "expanded to its shape", {**whole, "fc.0.weight": torch.zeros(1).expand(99999, 32)}
    yield "meta", {**whole, first: whole[first].to("meta")}
    yield "sparse", {**whole, first: whole[first].to_sparse()}
    yield "without one", {k: v for k, v in whole.items() if k != first}
    yield "keys with escapes", {f"\x1b[31m{k}\n": v for k, v in whole.items()}
    yield "odd keys", {**whole, 3: whole[first]}
    yield "nested", {"state_dict": whole, "epoch": 3}
    yield "list", list(whole.values())
    yield "number", 3
    yield "text", "\x1b[2J" * 9
    yield "nothing", None
    yield "code", {"a": Code()}
    yield "no bias of the head", {**whole, "fc.0.bias": torch.zeros(())}
    yield "a million classes", {**whole, "fc.0.bias": torch.zeros(1_000_000)}


def bombs() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """Small files that unpack to, or claim, far too much: (name, suffix, maker)."""

    def zip_of(compression: int, repeat: int) -> Callable[[Path], object]:
        def make(path: Path) -> None:
            whole = torch_file({"a": torch.zeros(1 << 20)})
            with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(path, "w") as target:
                for name in source.namelist():
                    content = source.read(name)
                    big = len(content) > 1 << 20
                    if big:
                        content = bytes(len(content) * repeat)
                    elif name.endswith("data.pkl"):
                        size = struct.pack("<i", (1 << 20) * repeat)
                        content = content.replace(struct.pack("<i", 1 << 20), size)
                    kind = compression if big else zipfile.ZIP_STORED
                    target.writestr(name, content, kind, compresslevel=1)

        return make

    yield "zip bomb", ".pt", zip_of(zipfile.ZIP_DEFLATED, 700)
    yield "deflated", ".pth", zip_of(zipfile.ZIP_DEFLATED, 1)
    for suffix in (".safetensors", ".pt", ".bin", ".pth"):
        yield f"sparse{suffix}", suffix, lambda path: sparse(path, 10 << 30)
    size = 10 << 30
    text = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    start = struct.pack("<Q", len(text)) + text
    yield "sparse tensor", ".safetensors", lambda path: sparse(path, len(start) + size, start)
    claim = struct.pack("<Q", 9 * 10**7)
    yield "sparse header", ".safetensors", lambda path: sparse(path, size, claim + b"{")
    blank = claim + b'{"a":"' + b" " * 100
    yield "open text", ".safetensors", lambda path: sparse(path, 9 * 10**7 + 8, blank)
    legacy = torch_file({"a": torch.zeros(70_000)}, legacy=True)
    numel = struct.pack("<i", 70_000)
    yield (
        "legacy claim",
        ".pt",
        lambda path: path.write_bytes(legacy.replace(numel, struct.pack("<i", 2**31 - 1))),
    )
    text4 = b"\x80\x02X\xff\xff\xff\x7f"
    yield "pickle claim", ".pt", lambda path: path.write_bytes(text4 + b"a" * 50)
    yield "pickle nested", ".pt", lambda path: path.write_bytes(b"\x80\x02" + b"(" * 10**6)


def files(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """Every weights file, under the commands in turn."""
    whole = (originals.model / "model.safetensors").read_bytes()
    state = load_file(originals.model / "model.safetensors")
    spoilt: list[tuple[str, str, bytes, frozenset[int]]] = []
    kinds = {
        ".safetensors": whole,
        ".pt": torch_file(state),
        ".bin": torch_file(state, legacy=True),
        ".pth": torch_file(state),
    }
    for suffix, content in kinds.items():
        cut = truncations(rng, content, 6)
        spoilt += [(f"{suffix} cut {n}", suffix, part, BAD) for n, part in enumerate(cut)]
        for bits in (1, 40):
            turned = enumerate(flips(rng, content, 5, bits))
            spoilt += [(f"{suffix} {bits} flipped {n}", suffix, part, MAYBE) for n, part in turned]
        turned = enumerate(flips(rng, content[:600], 4, 3))
        spoilt += [(f"{suffix} head {n}", suffix, h + content[600:], MAYBE) for n, h in turned]
        for name, odd in (
            ("empty", b""),
            ("text", b"no weights\n" * 9),
            ("noise", rng.randbytes(999)),
        ):
            spoilt.append((f"{suffix} {name}", suffix, odd, BAD))
    spoilt += [(name, ".safetensors", content, MAYBE) for name, content in headers(whole)]
    for number, (name, value) in enumerate(states(state)):
        codes = BAD if name not in ("huge", "integers", "booleans", "nested") else MAYBE
        spoilt.append((name, ".pt", torch_file(value, legacy=number % 2 == 1), codes))
    nans = {k: v * float("nan") if v.is_floating_point() else v for k, v in state.items()}
    spoilt.append(("nan", ".safetensors", save(nans), BAD))
    spoilt.append(("code", ".bin", pickle.dumps({"a": Code()}), BAD))
    spoilt.append(("code of old", ".pt", b"cos\nsystem\n(S'touch executed'\ntR.", BAD))
    for number, (name, suffix, content, codes) in enumerate(spoilt):
        yield Case(
            "weights", name, partial(write_and_use, originals, number, suffix, content), codes
        )
    for number, (name, suffix, maker) in enumerate(bombs()):

        def build(
            folder: Path, suffix: str = suffix, maker: Any = maker, number: int = number
        ) -> Args:
            maker(folder / f"w{suffix}")
            return use(originals, folder / f"w{suffix}", number)

        yield Case("weights", name, build, BAD)
    yield from no_files(originals)


def write_and_use(
    originals: Originals, number: int, suffix: str, content: bytes, folder: Path
) -> Args:
    """A weights file with ``content``, under command ``number``."""
    return use(originals, replaced(folder / f"w{suffix}", content), number)


def no_files(originals: Originals) -> Iterator[Case]:
    """Pipes, devices, folders, links and archives where a weights file should be."""

    def archive(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for name in ("storages", "tensors", "pickle", "../../escaped"):
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())

    makers: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "circle of links": lambda path: path.symlink_to(path.name),
        "broken link": lambda path: path.symlink_to("nowhere"),
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "/dev/null": lambda path: path.symlink_to("/dev/null"),
        "/proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
        "tar": archive,
    }
    for number, (name, maker) in enumerate(makers.items()):
        for command in (number, number + 1):

            def build(folder: Path, maker: Any = maker, command: int = command) -> Args:
                maker(folder / "w.pt")
                return use(originals, folder / "w.pt", command)

            # reading memory is EIO, as on a disk that fails
            codes = {74} if name == "/proc/self/mem" else {65, 66}
            yield Case("weights", name, build, frozenset(codes))
