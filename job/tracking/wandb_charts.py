"""Charts and images of a W&B run: accuracy against costs, confusion of classes, examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.artifacts.accuracy import score_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from job.artifacts.evaluation_record import RoundEvaluation
    from job.artifacts.records import RoundRecord
    from job.tracking.wandb_process import Table, WandbChart

AXIS_TITLES = {"params": "parameters", "macs": "multiply-adds", "latency": "latency in seconds"}
MAX_ROWS = 10_000  # of a W&B table
EXAMPLE_COLUMNS = ("image", "file", "class", "base", "recommended")


def accuracy_charts(entries: Sequence[RoundRecord]) -> dict[str, WandbChart]:
    """Return the charts of accuracy against each cost that was measured, a point for each round."""
    metric, charts = entries[0].metric, {}
    for cost, words in AXIS_TITLES.items():
        points = [(e.name, getattr(e, cost), e.valid_acc) for e in entries]
        points = [point for point in points if point[1] is not None]
        if points:
            charts[f"accuracy/by_{cost}"] = _chart(
                "wandb/scatter/v0",
                f"Validation {score_name(metric)} against {words}",
                {"x": cost, "y": f"valid_{metric}"},
                (("round", cost, f"valid_{metric}"), points),
            )
    return charts


def confusion_chart(
    name: str, evaluation: RoundEvaluation | None, class_names: Sequence[str]
) -> dict[str, WandbChart]:
    """Return the confusion matrix of the model ``name``; none without an evaluation.

    Its rows are the cells with images, or the MAX_ROWS cells with most images if there are more.
    """
    if evaluation is None:
        return {}
    cells = evaluation.confusion().most_common(MAX_ROWS)
    columns = ("Actual", "Predicted", "nPredictions")
    rows = [
        (_class_name(class_names, true), _class_name(class_names, predicted), count)
        for (true, predicted), count in sorted(cells)
    ]
    chart = _chart(
        "wandb/confusion_matrix/v1",
        f"Validation images of the {name} model by class and prediction",
        {column: column for column in columns},
        (columns, rows),
    )
    return {f"confusion/{name}": chart}


def example_images(
    evaluation: RoundEvaluation | None, class_names: Sequence[str]
) -> dict[str, Table]:
    """Return tables of images that base and recommended model classify differently, if any."""
    examples = evaluation.examples if evaluation else ()
    tables: dict[str, Table] = {}
    for name, is_lost in (("lost", True), ("won", False)):
        rows = [
            (
                e.image,
                e.name,
                *(_class_name(class_names, number) for number in (e.label, e.base, e.predicted)),
            )
            for e in examples
            if (e.base == e.label) == is_lost
        ]
        if rows:
            tables[f"examples/{name}"] = (EXAMPLE_COLUMNS, rows)
    return tables


def _chart(spec: str, title: str, fields: dict[str, str], table: Table) -> WandbChart:
    return {"spec": spec, "title": title, "fields": fields, "table": table}


def _class_name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else str(number)
