"""Run ``gammaslim`` and write down the hash of every image that is trained on.

    python record_batches.py FILE LAST prune …

FILE gets a line for each step and process: round, step of the round, hashes of images with their
labels, as this process got them. After LAST steps, if that is not 0, it kills itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import job.training.trainer
from job.__main__ import main

original = job.training.trainer.TrainingRound.step
steps = 0


def recording(self: Any, batch: Any, size: int, number: int) -> None:
    global steps
    images, labels = batch
    hashes = [
        hashlib.sha256(image.numpy().tobytes() + bytes([label])).hexdigest()[:16]
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    with file.open("a") as lines:
        lines.write(json.dumps([self.spec.round_index, number, hashes]) + "\n")
    original(self, batch, size, number)
    steps += 1
    if steps == last:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # loader processes import this too
    file, last = Path(sys.argv[1]), int(sys.argv[2])
    sys.argv = ["gammaslim", *sys.argv[3:]]
    job.training.trainer.TrainingRound.step = recording  # type: ignore[method-assign]
    main()
