"""A base that is trained for sparsity, through the whole job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.commands import gammaslim
from support.datasets import write_noise_idx


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def test_a_base_trained_for_sparsity(tmp_path: Path) -> None:
    """From scratch, then from the weights of that; the rounds that follow are as ever."""
    data = write_noise_idx(tmp_path / "idx", 48, 20)
    common = (
        "prune", "--data", data, "--model-arg", "base=4", "--epochs", 1, "--batch-size", 16,
        "--wandb", "off", "--sparsity", "l1", "--sparsity-weight", 30,
        "--sparsity-epochs", 2,
    )  # fmt: skip
    scratch, tuned = tmp_path / "scratch", tmp_path / "tuned"
    plan = gammaslim(*common, "--base-epochs", 3, "--dry-run", "--output", scratch)
    assert "3 epochs of base training, 2 with l1 on γ, then" in plan.out, plan
    done = gammaslim(*common, "--base-epochs", 0, "--rounds", 1, "--output", scratch)
    assert done.code == 0, done
    assert "sparsity: l1 on γ for 2 epochs" in done.out
    assert [(e["round"], e["epoch"]) for e in events(scratch, "epoch")] == [(0, 0), (0, 1), (1, 0)]
    assert all(0 <= e["gamma_small"] < 1 and e["gamma_mean"] > 0 for e in events(scratch, "epoch"))
    before, after = events(scratch, "gamma")
    assert [(g["when"], g["epoch"], g["round"]) for g in (before, after)] == [
        ("before", 0, 0), ("after", 2, 0),
    ]  # fmt: skip
    assert before["bins"] == [0] * 19 + [before["count"]]  # every γ begins as 1
    assert after["max"] < 1
    summary = json.loads((scratch / "summary.json").read_text())
    assert summary["base"]["best_epoch"] == 1
    weights = scratch / "rounds/00/model.safetensors"
    again = gammaslim(*common, "--weights", weights, "--rounds", 0, "--output", tuned)
    assert again.code == 0, again
    assert len(events(tuned, "epoch")) == 2
    start, _ = events(tuned, "gamma")
    assert {k: start[k] for k in ("bins", "max")} == {k: after[k] for k in ("bins", "max")}
    other = gammaslim(*common, "--weights", weights, "--rounds", 0, "--sparsity-weight", 3,
                      "--output", tuned)  # fmt: skip
    assert other.code == 78, other
    assert "--sparsity-weight 30" in other.err
