"""Generated photographs in Food-11 files: JPEGs of 512 x 490 pixels, about 75 KB each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, WIDTH, HEIGHT = 11, 512, 490
DISTINCT = 200  # files with content of their own; the others are hard links to them


def draw_photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft shapes with fine grain, which compress as a photograph does."""
    coarse = rng.integers(0, 256, (9, 9, 3), np.uint8)
    shapes = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    middle = rng.integers(-40, 41, (height // 4, width // 4, 1))
    middle = np.repeat(np.repeat(middle, 4, 0), 4, 1)
    grain = np.zeros((height, width, 1), np.int64)
    grain[: middle.shape[0], : middle.shape[1]] += middle // 2
    grain += rng.integers(-9, 10, (height, width, 1))
    return Image.fromarray((shapes + grain).clip(0, 255).astype(np.uint8))


def write_photos(
    folder: Path, training: int, validation: int, *, width: int = WIDTH, height: int = HEIGHT
) -> Path:
    """Write ``CLASS_NUMBER.jpg`` into ``folder/training`` and ``folder/validation``, once."""
    rng = np.random.default_rng(0)
    written: list[Path] = []
    for split, count in (("training", training), ("validation", validation)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = folder / split / f"{number % CLASSES}_{number}.jpg"
            if path.exists():
                continue
            if len(written) < DISTINCT:
                draw_photo(rng, width, height).save(path, quality=90)
                written.append(path)
            else:
                path.hardlink_to(written[number % DISTINCT])
    return folder
