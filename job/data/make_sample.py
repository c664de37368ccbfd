"""Make the built-in data set: a stratified sample of Fashion-MNIST, as gzipped IDX files.

    apt-get install dataset-fashion-mnist
    python -m job.data.make_sample /usr/share/datasets/fashion-mnist job/data/fashion_mnist

Training and validation images come from the original training files, test images from the original
test files. All classes have the same number of images, in the original order.
"""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np

from job.data.idx import read_idx

SAMPLE_SEED = 20170825  # the day Fashion-MNIST was published
PER_CLASS = {"train": 600, "validation": 150, "t10k": 100}


def _write(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    # no time and no file name, for reproducible bytes
    path.write_bytes(gzip.compress(header + values.tobytes(), 9, mtime=0))


def _draw_indices(labels: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Draw disjoint sets of sorted indices; set k has ``sizes[k]`` of each class."""
    order = np.argsort(np.random.Philox(SAMPLE_SEED).random_raw(len(labels)), kind="stable")
    parts: list[list[np.ndarray]] = [[] for _ in sizes]
    for label in np.unique(labels):
        members = order[labels[order] == label]
        for part, chosen in zip(parts, np.split(members, np.cumsum(sizes))[:-1], strict=False):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


def make_sample(source: Path, target: Path) -> None:
    """Read the four original files in ``source`` and write the six of the sample."""
    target.mkdir(parents=True, exist_ok=True)
    for original, splits in (("train", ("train", "validation")), ("t10k", ("t10k",))):
        images = read_idx(source / f"{original}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{original}-labels-idx1-ubyte.gz")
        for split, chosen in zip(
            splits, _draw_indices(labels, *(PER_CLASS[s] for s in splits)), strict=True
        ):
            _write(target / f"{split}-images-idx3-ubyte.gz", images[chosen])
            _write(target / f"{split}-labels-idx1-ubyte.gz", labels[chosen])


if __name__ == "__main__":
    make_sample(Path(sys.argv[1]), Path(sys.argv[2]))
