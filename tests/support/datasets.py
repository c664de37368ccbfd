"""Small data sets, written to disk."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def draw_image(rng: np.random.Generator, label: int, width: int, height: int) -> Image.Image:
    """Noise with a bright bar whose place tells the class."""
    pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
    start = (label * width) // 4
    pixels[:, start : start + width // 4] += 150
    return Image.fromarray(pixels)


def write_flat(root: Path, counts: dict[str, int], classes: int = 3, size: int = 40) -> Path:
    """Food-11 files: ``counts`` images a class in each split, ``CLASS_NUMBER.png``."""
    rng = np.random.default_rng(7)
    for split, count in counts.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for label in range(classes):
            for number in range(count):
                draw_image(rng, label, size, size + label).save(
                    root / split / f"{label}_{number}.png"
                )
    return root


def write_idx(path: Path, values: np.ndarray) -> None:
    """An IDX file of unsigned bytes, gzipped when the name says so."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_noise_idx(root: Path, train: int, valid: int, classes: int = 4, side: int = 32) -> Path:
    """IDX files of noise images, without flat areas, whose mean tells the class."""
    rng = np.random.default_rng(11)
    root.mkdir(parents=True)
    for split, count in (("train", train), ("validation", valid)):
        labels = np.arange(count) % classes
        images = rng.integers(0, 128, (count, side, side)) + labels[:, None, None] * 30
        write_idx(root / f"{split}-images-idx3-ubyte", images)
        write_idx(root / f"{split}-labels-idx1-ubyte", labels)
    return root
