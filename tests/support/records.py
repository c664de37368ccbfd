"""Records of runs, filled in but for what a test is about."""

from __future__ import annotations

from job.artifacts.records import BaseRecord, DatasetRecord, RoundRecord


def round_record(number: int, accuracy: float, params: int = 100) -> RoundRecord:
    """The entry of a round with that accuracy and so many parameters."""
    return RoundRecord(
        round=number, width=1.0, channels=10, params=params, macs=40 * params, bytes=4 * params,
        valid_acc=accuracy, valid_loss=0.5, step=1,
    )  # fmt: skip


def round_records(*accuracies: float) -> list[RoundRecord]:
    """The base and rounds, each a parameter smaller than the one before."""
    return [round_record(i, accuracy, 100 - i) for i, accuracy in enumerate(accuracies)]


DATASET = DatasetRecord(
    layout="idx", root="data", listing=2, training=1, validation=1, skipped=(), fingerprint="f"
)
BASE = BaseRecord(weights_sha256="", epochs=0)
