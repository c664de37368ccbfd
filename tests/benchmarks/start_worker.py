"""The command of a user that notes when its first training step is done, then asks it to stop.

python tests/benchmarks/start_worker.py NOTE STOP prune …
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

MODULE, CLASS = "job.training.trainer", "TrainingRound"


def watch(note: Path, stop: Path) -> None:
    """Wait until the trainer is imported, which must not happen any earlier than for a user."""
    while not hasattr(sys.modules.get(MODULE), CLASS):
        time.sleep(0.002)
    training = getattr(sys.modules[MODULE], CLASS)
    step = training.step

    def first(self: Any, *args: Any) -> None:
        training.step = step
        step(self, *args)
        note.write_text(str(time.time()))
        stop.touch()

    training.step = first


def main() -> None:
    note, stop = map(Path, sys.argv[1:3])
    sys.argv[1:] = sys.argv[3:]
    note.unlink(missing_ok=True)
    threading.Thread(target=watch, args=(note, stop), daemon=True).start()
    from job.__main__ import main as program

    program()


if __name__ == "__main__":
    main()
