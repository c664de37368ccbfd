"""Events for W&B: the values of a run's records that W&B shows, and their keys.

=======================  ==========================================================
key                      value
=======================  ==========================================================
``epoch/NAME``           each field of `EpochRecord`, over ``epoch/step``
``round/NAME``           each field of `RoundRecord` but the cautions, over
                         ``round/round``
``round/gamma_…/LAYER``  histograms of γ, before and after a round
``accuracy/by_COST``     charts of accuracy against parameters, multiply-adds and
                         latency, a point for each round so far
``confusion/…``          confusion matrix of the ``base`` and the ``recommended``
                         model
``examples/…``           images that the base alone, or the recommended model alone,
                         classifies correctly
``layers``               a table of the layers' channels and costs
``model-ID``             the models of the rounds, an artifact; its aliases are
                         ``base``, ``round-K`` and ``recommended``
``data-…``, ``base-…``   artifacts that the run starts from: data, weights
=======================  ==========================================================

W&B groups its panels by the part of a key before the slash. A new value is a field of one of the
records, or an entry in the function here that makes its event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from job.artifacts.accuracy import accuracy_change
from job.artifacts.evaluation_record import find_evaluation
from job.artifacts.json_records import to_json
from job.slimming.planning.cost import layer_costs
from job.tracking.wandb_charts import accuracy_charts, confusion_chart, example_images

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from job.artifacts.model_card import ModelCard
    from job.artifacts.records import (
        BaseRecord,
        DatasetRecord,
        EpochRecord,
        RoundRecord,
        SummaryRecord,
    )
    from job.files import JsonObject
    from job.tracking.wandb_process import Histogram, RunInput, Table, WandbChart

T = TypeVar("T")

AXES = {"epoch/*": "epoch/step", "round/*": "round/round"}  # keys -> the key of their x axis
LAYER_COLUMNS = ("layer", "kind", "in", "out", "params", "macs")
HISTOGRAM_BINS = 64


@dataclass(frozen=True)
class WandbModel:
    """A model to upload as an artifact: the files of ``folder``."""

    folder: str
    aliases: tuple[str, ...]
    metadata: Mapping[str, object]


@dataclass(frozen=True)
class WandbEvent:
    """Values that W&B logs together.

    ``histograms`` are (counts, edges of bins), ``tables`` are (columns, rows). ``galleries`` are
    tables whose first column holds images, as data URLs.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    model: WandbModel | None = None
    charts: Mapping[str, WandbChart] = field(default_factory=dict)
    galleries: Mapping[str, Table] = field(default_factory=dict)


def epoch_event(record: EpochRecord) -> WandbEvent:
    """Return the event of an epoch."""
    return WandbEvent(_keyed("epoch", _with_metrics(to_json(record))))


def round_event(
    entries: Sequence[RoundRecord],
    before: nn.Module,
    after: nn.Module,
    card: ModelCard,
    folder: Path,
) -> WandbEvent:
    """Return the event of the last round in ``entries``, which begin with the base.

    ``before`` and ``after`` are the networks before and after this round. ``card`` describes the
    network ``after``, and ``folder`` holds it.
    """
    record = entries[-1]
    content = _with_metrics(to_json(record))
    layers = layer_costs(after, card.preprocessing.input_size)
    rows = [(c.name, c.kind, c.channels_in, c.channels_out, c.params, c.macs) for c in layers]
    evaluation = None if record.round else find_evaluation(folder)
    aliases = (f"round-{record.round}",) if record.round else ("round-0", "base")
    return WandbEvent(
        values=_keyed("round", {k: v for k, v in content.items() if k != "cautions"}),
        histograms=_keyed("round/gamma_before", gamma_histograms(before))
        | _keyed("round/gamma_after", gamma_histograms(after)),
        tables={"layers": (LAYER_COLUMNS, rows)},
        charts=accuracy_charts(entries) | confusion_chart("base", evaluation, card.class_names),
        model=WandbModel(str(folder), aliases, {**content, "lineage": to_json(card.lineage)}),
    )


def recommended_event(summary: SummaryRecord, card: ModelCard, folder: Path) -> WandbEvent:
    """Return the event of the recommended model of a finished run.

    ``card`` describes the model, and ``folder`` holds it.
    """
    evaluation, names = find_evaluation(folder), card.class_names
    lineage = {"reason": summary.reason, "lineage": to_json(card.lineage)}
    return WandbEvent(
        charts=confusion_chart("recommended", evaluation, names),
        galleries=example_images(evaluation, names),
        model=WandbModel(str(folder), ("recommended",), {**summary_values(summary), **lineage}),
    )


def run_inputs(data: DatasetRecord, base: BaseRecord, weights: str | None) -> list[RunInput]:
    """Return the artifacts that a run starts from: its data and, if given, its ``weights``.

    Their names follow from their content, so runs that share them are connected in W&B.
    """
    inputs: list[RunInput] = [
        {"name": f"data-{data.fingerprint[:12]}", "kind": "dataset", "metadata": to_json(data)}
    ]
    if weights:
        sha256 = base.weights_sha256
        metadata = {"weights": weights, "sha256": sha256}
        inputs.append({"name": f"base-{sha256[:12]}", "kind": "weights", "metadata": metadata})
    return inputs


def summary_values(summary: SummaryRecord) -> JsonObject:
    """Return W&B's summary of a run: the recommended round, its record and the change to the base.

    ``points`` are percentage points of accuracy, ``params_of_base`` and the like fractions. Scores
    of the last round, e.g. ``last_valid_acc``, compare runs to the same size, whatever each of them
    recommends.
    """
    recommended, base = summary.entries[summary.recommended_round], summary.base
    change = {
        "points": accuracy_change(recommended.valid_acc, base.valid_acc),
        "params_of_base": recommended.params / max(base.params, 1),
        "macs_of_base": recommended.macs / max(base.macs, 1),
        "bytes_of_base": recommended.bytes / max(base.bytes, 1),
    }
    last = _with_metrics(to_json(summary.entries[-1]))
    scores = {f"last_{key}": last[key] for key in last if key.startswith("valid_")}
    best = _with_metrics(to_json(recommended))
    return {"recommended": summary.recommended, **best, **change, **scores}


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
    """Return a record with the other metrics of a task as separate values."""
    metrics = content.pop("metrics", {})
    assert isinstance(metrics, dict)
    return content | {f"valid_{name}": value for name, value in metrics.items()}
