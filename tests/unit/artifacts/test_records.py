"""Records of a run directory: what was written is read back, and files of other versions load."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from job.artifacts.json_records import from_json, to_json
from job.artifacts.records import (
    BaseRecord,
    DatasetRecord,
    EpochRecord,
    GammaRecord,
    Lineage,
    LockRecord,
    ResumeRecord,
    RoundRecord,
    SlimRecord,
    StatusRecord,
    StopRecord,
    SummaryRecord,
    to_line,
)
from job.slimming.planning.layer_channels import LayerChannels
from job.slimming.sensitivity.record import Sensitivity
from job.training.checkpoint_content import CutRecord, PrunedScores, RoundProgress, TrainingProgress

ROUND = {
    "round": 1, "width": 0.95, "channels": 978, "params": 235809, "macs": 1764924, "bytes": 951124,
    "valid_acc_pruned": 0.7313333333333333, "valid_acc": 0.7386666666666667, "valid_loss": 0.65,
    "best_epoch": 0, "train_acc": 0.73, "cautions": ["a"], "step": 564, "seconds": 12,
}  # fmt: skip
OPTIONAL = ("valid_acc_pruned", "best_epoch", "train_acc", "cautions", "seconds")
BASE = {key: value for key, value in ROUND.items() if key not in OPTIONAL} | {"round": 0}
EPOCH = {
    "round": 1, "epoch": 0, "step": 752, "train_loss": 0.7, "train_acc": 0.7, "valid_loss": 0.6,
    "valid_acc": 0.75, "lr": 1e-8, "images_per_second": 1572.5, "seconds": 3.9, "gamma_mean": 1.0,
    "gamma_small": 0.0, "width": 0.95, "params": 64495, "macs": 925776,
}  # fmt: skip
SUMMARY = {
    "format": 1, "state": "finished", "base": BASE, "rounds": [ROUND],
    "recommended": "rounds/01", "reason": "", "cautions": [], "seconds": 22.964,
}  # fmt: skip
LAYERS = {"cnn.0": {"out": [0, 2], "in": [1]}, "cnn.1": {"select": [3], "bias": True}}
PROGRESS = {
    "step": 752, "scores": {"valid_acc_pruned": 0.7},
    "plan": {"wide": "73a5", "width": 0.55, "layers": LAYERS},
    "metrics_size": 2048, "round_seconds": 3.5, "run_seconds": 4.5,
}  # fmt: skip
SENSITIVITY = {
    "loss": "kl", "images": 16, "fractions": [0.5, 0.0], "target": None,
    "groups": [
        {"group": "cnn.0", "channels": 4, "macs": 0.5, "params": 0.25,
         "points": [{"fraction": 0.5, "channels": 2, "loss": 1e-05},
                    {"fraction": 0.0, "channels": 0, "loss": None}],
         "kept": 3},
        {"group": "cnn.1", "channels": 4, "macs": 0.5, "params": 0.25, "points": [], "kept": None},
    ],
    "blocked": [{"layer": "fc", "channels": 3, "reason": "the network's output"}],
}  # fmt: skip
TRAINING = {"processes": 2, "seconds": 1.5, "best": None}
LINEAGE = {
    "base_sha256": "1", "seed": 0, "listing": 2, "fresh_classifier": True, "base_weights": "w",
    "from": {"base_sha256": "0", "run": "/a", "round": 2}, "run": "/b", "round": 1,
    "wide_sha256": "2",
}  # fmt: skip
DATASET = {
    "layout": "idx", "root": "/d", "listing": 2, "path": "/d", "training": 6000,
    "validation": 1500, "skipped": [], "fingerprint": "00",
}  # fmt: skip
STATUS = {"state": "running", "exit_code": None, "round": 1, "epoch": 2, "step": 3, "time": 1.5}
LOCK = {
    "id": "1", "host": "node7", "boot": "b", "processes": "pid:[1]", "pid": 7, "started": None
}  # fmt: skip
FILES: list[tuple[type[Any], dict[str, Any]]] = [
    (RoundRecord, ROUND), (RoundRecord, BASE),
    (RoundRecord, ROUND | {"latency": 0.0042, "speedup": 1.37}),
    (EpochRecord, EPOCH), (SummaryRecord, SUMMARY),
    (StatusRecord, STATUS), (LockRecord, LOCK),
    (RoundProgress, PROGRESS), (TrainingProgress, TRAINING),
    (RoundProgress, PROGRESS | {"sensitivity": SENSITIVITY}), (Sensitivity, SENSITIVITY),
    (Lineage, LINEAGE), (Lineage, {}),
    (DatasetRecord, DATASET), (BaseRecord, {"weights_sha256": "", "epochs": 2}),
    (PrunedScores, {}), (CutRecord, {"wide": "", "width": 1.0, "layers": {}}),
    (SlimRecord, {"round": 1, "width": 0.9, "valid_acc_pruned": 0.7, "valid_loss_pruned": 1.5,
                  "verification_error": 1e-16}),
    (SlimRecord, {"round": 1, "width": 0.9, "valid_acc_pruned": 0.7, "valid_loss_pruned": 1.5,
                  "verification_error": 1e-16, "valid_acc_recovered": 0.8,
                  "valid_loss_recovered": 1.25}),
    (PrunedScores, {"valid_acc_pruned": 0.5, "valid_acc_recovered": 0.75}),
    (GammaRecord, {"round": 0, "epoch": 1, "when": "after", "count": 3, "zeros": 1, "max": 1.0,
                   "bins": [1, 2]}),
    (StopRecord, {"state": "stopped", "exit_code": 75}),
    (ResumeRecord, {"round": 0, "epoch": 0, "batch": 4, "processes": 2, "processes_before": None}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content"), FILES)
def test_a_record_is_written_as_it_was_read(kind: type[Any], content: dict[str, Any]) -> None:
    record = from_json(kind, json.loads(json.dumps(content)))
    assert json.dumps(to_json(record)) == json.dumps(content)  # the order of the keys too
    if hasattr(kind, "EVENT"):
        line = to_line(record)
        assert next(iter(line.items())) == ("event", kind.EVENT)
        assert from_json(kind, line) == record


@pytest.mark.parametrize(("kind", "content"), FILES)
def test_a_newer_file_is_read_without_what_it_has_more(
    kind: type[Any], content: dict[str, Any]
) -> None:
    assert from_json(kind, content | {"later": [1]}) == from_json(kind, content)


def test_a_summary_from_before_there_were_cautions() -> None:
    old = {key: SUMMARY[key] for key in SUMMARY if key not in ("format", "reason", "cautions")}
    summary = from_json(SummaryRecord, old)
    assert (summary.format, summary.reason, summary.cautions) == (1, "", ())
    assert to_json(summary) == SUMMARY
    assert summary.recommended_round == 1
    assert [entry.round for entry in summary.entries] == [0, 1]
    assert summary.base.cautions == ()


def test_a_kept_channel_is_an_index() -> None:
    layers = from_json(CutRecord, PROGRESS["plan"]).layers
    assert layers["cnn.0"] == LayerChannels(out=(0, 2), in_=(1,))
    with pytest.raises(Exception, match="rising indices"):
        from_json(CutRecord, {"wide": "", "width": 1.0, "layers": {"a": {"out": [2, 1]}}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round": True}, "round: True is not int"),
        ({"valid_acc": "x" * 100}, "valid_acc: 'xx.* ... is not float"),
        ({"valid_acc": None}, "valid_acc: None is not float"),
        ({"best_epoch": 0.5}, "best_epoch: 0.5 is not int"),
        ({"cautions": "a"}, "cautions: 'a' is not"),
        ({"cautions": [1]}, "cautions: 1 is not str"),
    ],
)
def test_a_damaged_value_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_json(RoundRecord, ROUND | change)
    with pytest.raises(ValueError, match="params is missing"):
        from_json(RoundRecord, {key: value for key, value in ROUND.items() if key != "params"})
    for content in ([], None, "x"):
        with pytest.raises(ValueError, match="is not a table of values"):
            from_json(RoundRecord, content)


def test_a_lenient_reader_leaves_out_what_can_be_missing() -> None:
    record = from_json(RoundRecord, ROUND | {"best_epoch": "x", "cautions": 1}, lenient=True)
    assert (record.best_epoch, record.cautions, record.train_acc) == (None, (), 0.73)
    with pytest.raises(ValueError, match="params: 'x' is not int"):
        from_json(RoundRecord, ROUND | {"params": "x"}, lenient=True)
    assert from_json(Lineage, LINEAGE | {"from": 3}, lenient=True).from_ is None


@dataclass(frozen=True)
class Small:
    number: int = 0
    for_: str = field(default="", metadata={"key": "for what"})


@dataclass(frozen=True)
class Whole(Small):
    WRITE_DEFAULTS: ClassVar[bool] = True

    part: Small = Small()


def test_a_default_is_left_out_unless_the_class_writes_it() -> None:
    assert to_json(Small()) == {}
    assert to_json(Whole(1)) == {"number": 1, "for what": "", "part": {}}
    assert from_json(Whole, {"for what": "a"}) == Whole(for_="a")


def test_records_need_no_torch() -> None:
    program = "import sys, job.artifacts.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
