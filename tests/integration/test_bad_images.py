"""A job with images that cannot be read ends with 65, or counts what it skips."""

from __future__ import annotations

from pathlib import Path

from support.commands import gammaslim
from support.datasets import write_flat


def test_prune_ends_with_65_or_counts_and_lists_what_it_skips(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 4, "validation": 2})
    image = data / "training" / "1_99.png"
    image.write_bytes((data / "training" / "1_1.png").read_bytes()[:-700])
    common = ("prune", "--data", data, "--output", tmp_path / "run", "--dry-run")
    failed = gammaslim(*common)
    assert failed.code == 65, failed
    assert failed.err.count("\n") == 1
    assert "1_99.png" in failed.err
    skipped = gammaslim(*common, "--on-bad-image", "skip")
    assert skipped.code == 0, skipped
    assert "skipped: 1 image that cannot be read:" in skipped.out
    assert "training/1_99.png" in skipped.out
