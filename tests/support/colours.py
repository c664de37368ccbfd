"""Images with several labels each: the channels that are bright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("blue", "green", "red")


def write(folder: Path, count: int, *, columns: bool = False) -> Path:
    """``count`` images whose channels are bright or dark, in a CSV without a validation split."""
    random, lines = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        bright = random.integers(0, 2, 3)
        image = random.integers(0, 90, (32, 32, 3)) + 150 * bright
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
        names = [name for name, has in zip(COLOURS[::-1], bright, strict=True) if has]
        marks = [str(int(name in names)) for name in COLOURS]
        lines.append(",".join([f"{number}.png", *(marks if columns else ["|".join(names)])]))
    header = ",".join(["file", *(COLOURS if columns else ["labels"])])
    path = folder / "images.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path
