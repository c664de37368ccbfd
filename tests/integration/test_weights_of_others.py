"""A job that starts from weights of other classes, or of another width."""

from __future__ import annotations

from pathlib import Path

from support.commands import gammaslim
from support.weights_files import save_as_the_homework_did, state


def test_prune_replaces_a_classifier_of_other_classes_and_says_so(
    flat_data: Path, tmp_path: Path
) -> None:
    save_as_the_homework_did(tmp_path / "w.bin", state())
    args = ("prune", "--data", flat_data, "--weights", tmp_path / "w.bin", "--dry-run")
    done = gammaslim(*args, cwd=tmp_path)
    assert done.code == 0, done
    assert "they have 11 classes instead of 3 (the data or --num-classes): all" in done.out
    assert "weights are used except those of the classifier fc.0, which starts from" in done.out
    assert "--base-epochs N" in done.out
    fine = gammaslim(*args, "--num-classes", 11, cwd=tmp_path)
    assert fine.code == 0, fine
    assert "236,066" in fine.out
    assert "classes instead of" not in fine.out


def test_prune_ends_with_65_and_one_line_at_another_width(flat_data: Path, tmp_path: Path) -> None:
    save_as_the_homework_did(tmp_path / "w.bin", state(width_mult=0.95))
    done = gammaslim(
        "prune", "--data", flat_data, "--weights", tmp_path / "w.bin", "--dry-run", cwd=tmp_path
    )
    assert done.code == 65, done
    assert done.err.count("\n") == 1
    assert "pass --model-arg width_mult=…" in done.err
