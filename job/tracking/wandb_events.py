"""What W&B gets: which values of a run's records it shows, and under which keys.

=======================  ==========================================================
key                      value
=======================  ==========================================================
``epoch/NAME``           each field of `EpochRecord`, over ``epoch/step``
``round/NAME``           each field of `RoundRecord` but the cautions, over
                         ``round/round``
``round/gamma_…/LAYER``  histograms of γ, before and after a round
``layers``               a table of the layers' channels and costs
``model-ID``             the model of a round, an artifact
=======================  ==========================================================

A new value is a field of one of the records, or an entry in the function here that makes its event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from job.artifacts.json_records import to_json
from job.slimming.planning.cost import layer_costs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from job.artifacts.records import EpochRecord, RoundRecord, SummaryRecord
    from job.files import JsonObject
    from job.models.input_size import InputSize
    from job.tracking.process import Histogram, Table

T = TypeVar("T")

AXES = {"epoch/*": "epoch/step", "round/*": "round/round"}  # keys -> the key of their x axis
LAYER_COLUMNS = ("layer", "kind", "in", "out", "params", "macs")
HISTOGRAM_BINS = 64


@dataclass(frozen=True)
class WandbModel:
    """A model to upload as an artifact: the files of ``folder``."""

    folder: str
    alias: str
    metadata: Mapping[str, object]


@dataclass(frozen=True)
class WandbEvent:
    """Values that W&B logs together.

    ``histograms`` are (counts, edges of bins), ``tables`` are (columns, rows).
    """

    values: Mapping[str, object]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    model: WandbModel | None = None


def epoch_event(record: EpochRecord) -> WandbEvent:
    """Return what W&B gets of an epoch."""
    return WandbEvent(_keyed("epoch", _with_metrics(to_json(record))))


def round_event(
    record: RoundRecord,
    before: nn.Module,
    after: nn.Module,
    image_size: InputSize,
    folder: Path,
) -> WandbEvent:
    """Return what W&B gets of a round.

    ``before`` and ``after`` are the networks before and after it, for inputs of
    ``image_size``, and ``folder`` holds its model.
    """
    content, layers = _with_metrics(to_json(record)), layer_costs(after, image_size)
    rows = [(c.name, c.kind, c.channels_in, c.channels_out, c.params, c.macs) for c in layers]
    return WandbEvent(
        values=_keyed("round", {k: v for k, v in content.items() if k != "cautions"}),
        histograms=_keyed("round/gamma_before", gamma_histograms(before))
        | _keyed("round/gamma_after", gamma_histograms(after)),
        tables={"layers": (LAYER_COLUMNS, rows)},
        model=WandbModel(str(folder), f"round-{record.round}", content),
    )


def summary_values(summary: SummaryRecord) -> JsonObject:
    """Return W&B's summary of a run: the recommended round and its record."""
    recommended = summary.entries[summary.recommended_round]
    return {"recommended": summary.recommended, **_with_metrics(to_json(recommended))}


def gamma_histograms(network: nn.Module) -> dict[str, Histogram]:
    """Return the histogram of γ of each affine BatchNorm2d, by layer name without dots."""
    return {
        name.replace(".", "_"): _histogram(layer.weight.detach().double().cpu().numpy())
        for name, layer in network.named_modules()
        if isinstance(layer, nn.BatchNorm2d) and layer.affine
    }


# float64: NumPy refuses bins narrower than the spacing of values, and γ may be nearly equal
def _histogram(values: Any) -> Histogram:
    counts, edges = np.histogram(values[np.isfinite(values)], bins=HISTOGRAM_BINS)
    return counts.tolist(), edges.tolist()


def _keyed(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _with_metrics(content: JsonObject) -> JsonObject:
    """Return a record with the other metrics of a task as values of their own."""
    metrics = content.pop("metrics", {})
    assert isinstance(metrics, dict)
    return content | {f"valid_{name}": value for name, value in metrics.items()}
