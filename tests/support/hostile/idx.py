"""IDX files that are cut, flipped, lie about their shape, or unpack to far too much."""

from __future__ import annotations

import gzip
import random
import struct
from collections.abc import Iterator
from pathlib import Path

from support.hostile.case import Args, Case, Originals, flips, linked, replaced, score, truncations

BAD, MAYBE = frozenset({65}), frozenset({0, 65})


def idx_files(rng: random.Random, originals: Originals) -> Iterator[Case]:
    """IDX files that are cut, flipped, that lie about their shape, or unpack to far too much."""
    images = (originals.idx / "train-images-idx3-ubyte").read_bytes()
    labels = (originals.idx / "train-labels-idx1-ubyte").read_bytes()

    def header(*shape: int, code: int = 8) -> bytes:
        return struct.pack(f">HBB{len(shape)}I", 0, code, len(shape), *shape)

    one = b"\7"
    spoilt: list[tuple[str, str, bytes, frozenset[int]]] = []
    for number, part in enumerate(truncations(rng, images, 6, 1)):
        spoilt.append((f"cut {number}", "images-idx3-ubyte", part, BAD))
        packed = gzip.compress(images)
        part = packed[: rng.randrange(2, len(packed) - 1)]
        spoilt.append((f"gzip cut {number}", "images-idx3-ubyte.gz", part, BAD))
        part = next(flips(rng, packed, 1, 9))
        spoilt.append((f"gzip flipped {number}", "images-idx3-ubyte.gz", part, MAYBE))
        flipped = next(flips(rng, images[:16], 1, 2)) + images[16:]
        spoilt.append((f"flipped {number}", "images-idx3-ubyte", flipped, MAYBE))
        flipped = next(flips(rng, labels, 1, 3))
        spoilt.append((f"labels flipped {number}", "labels-idx1-ubyte", flipped, MAYBE))
    shapes = (
        (0, 32, 32), (6, 0, 32), (6, 32, 32, 4), (2**32 - 1,) * 3, (6,), (), (1,) * 60, (1,) * 100,
        (0,) * 255, (2**32 - 1, 2**32 - 1, 0), (5, 32, 32), (6, 32, 33), (6, 1, 1),
    )  # fmt: skip
    for shape in shapes:
        body = one if set(shape) == {1} else images[16:]
        if 0 in shape:
            body = b""
        codes = BAD
        spoilt.append((f"images {shape[:4]}", "images-idx3-ubyte", header(*shape) + body, codes))
        spoilt.append((f"labels {shape[:4]}", "labels-idx1-ubyte", header(*shape) + body, codes))
    for code in (0, 7, 9, 11, 12, 13, 14, 255):
        content = header(6, 32, 32, code=code) + images[16:]
        spoilt.append((f"type {code}", "images-idx3-ubyte", content, BAD))
    for values in ([2**31 - 1] * 6, [-1] * 6, [0, 1, 2, 0, 1, 1999]):
        content = header(6, code=12) + struct.pack(">6i", *values)
        spoilt.append((f"labels {values[-1]}", "labels-idx1-ubyte", content, BAD))
    spoilt.append(("other labels", "labels-idx1-ubyte", header(4) + b"\0\1\2\0", BAD))
    spoilt.append(("empty", "images-idx3-ubyte", b"", BAD))
    spoilt.append(("empty gzip", "images-idx3-ubyte.gz", gzip.compress(b""), BAD))
    for kind in ("honest", "lying"):
        packed = packed_zeros(3 << 30, header(3 << 20 if kind == "honest" else 6, 32, 32))
        spoilt.append((f"gzip bomb {kind}", "images-idx3-ubyte.gz", packed, BAD))
    spoilt.append(
        ("gzip wide", "images-idx3-ubyte.gz", packed_zeros(6 * 10**8, header(6, 1, 10**8)), BAD)
    )
    spoilt.append(
        ("gzip bomb labels", "labels-idx1-ubyte.gz", packed_zeros(3 << 30, header(3 << 30)), BAD)
    )
    for name, suffix, content, codes in spoilt:

        def build(folder: Path, suffix: str = suffix, content: bytes = content) -> Args:
            data = linked(originals.idx, folder / "data")
            plain = suffix.removesuffix(".gz")
            (data / f"train-{plain}").unlink()
            replaced(data / f"train-{suffix}", content)
            return score(originals, data, 0)

        yield Case("IDX", name, build, codes)

    def wide(folder: Path) -> Args:
        data = linked(originals.idx, folder / "data")
        replaced(data / "validation-images-idx3-ubyte", header(3, 1, 2 * 10**7) + bytes(6 * 10**7))
        return score(originals, data, 1, "--transform", "small")

    yield Case("IDX", "wide", wide, MAYBE)


def packed_zeros(size: int, start: bytes) -> bytes:
    """``start`` and ``size`` zeros as a gzip file, of a thousandth of that."""
    block = 1 << 24
    whole, rest = divmod(size, block)
    zeros = gzip.compress(bytes(block))
    return gzip.compress(start) + zeros * whole + gzip.compress(bytes(rest))
