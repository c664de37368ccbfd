"""Classes of the validation split: confusion matrices, and changes of accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.artifacts.accuracy import accuracy_change, signed_points
from job.report.html import HtmlTable, NumberCell

if TYPE_CHECKING:
    from job.artifacts.evaluation_record import RoundEvaluation
    from job.artifacts.history import History

MAX_MATRIX_CLASSES = 20  # of a confusion matrix
MAX_CHANGED_CLASSES = 10  # of the table of changes
MAX_CONFUSIONS = 2  # other classes, for each class of the table


@dataclass(frozen=True)
class Cell:
    """Cell of a confusion matrix: number of images, and percentage of the true class."""

    count: int
    share: int
    right: bool


@dataclass(frozen=True)
class ConfusionMatrix:
    """Confusion matrix with a row for each true class; ``names`` are the classes."""

    title: str
    names: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def confusion_matrices(history: History) -> tuple[ConfusionMatrix, ...]:
    """Return the matrices of the base and of the slim model; none for many classes."""
    titles, slim = {0: "Base"}, history.slim_round
    if slim:
        titles[slim] = f"{'Recommended' if history.recommended else 'Last'}: round {slim}"
    return tuple(
        _matrix(history, titles[number], history.evaluations[number])
        for number in titles
        if number in history.evaluations
        and len(history.evaluations[number].counts) <= MAX_MATRIX_CLASSES
    )


def _matrix(history: History, title: str, evaluation: RoundEvaluation) -> ConfusionMatrix:
    cells, classes = evaluation.confusion(), range(len(evaluation.counts))
    rows = tuple(
        tuple(
            Cell(
                cells[true, predicted],
                round(100 * cells[true, predicted] / max(1, evaluation.counts[true])),
                true == predicted,
            )
            for predicted in classes
        )
        for true in classes
    )
    return ConfusionMatrix(title, tuple(history.class_name(number) for number in classes), rows)


def changed_classes(history: History) -> HtmlTable | None:
    """Return the classes whose accuracy changed most from the base to the slim model."""
    slim = history.slim_round
    best = history.evaluations.get(slim or 0)
    base = history.evaluations.get(0)
    if not slim or not base or not best or len(base.counts) != len(best.counts):
        return None
    rows = []
    pairs = zip(base.class_accuracy(), best.class_accuracy(), strict=True)
    for number, (before, after) in enumerate(pairs):
        if before is not None and after is not None:
            rows.append((accuracy_change(after, before), number, before, after))
    rows.sort(key=lambda row: (-abs(row[0]), row[1]))
    shown = sorted(rows[:MAX_CHANGED_CLASSES])
    name = "recommended" if history.recommended else f"round {slim}"
    header = ("class", "images", "base", name, "points", "most often misclassified as")
    return HtmlTable(
        header,
        tuple(
            (
                history.class_name(number),
                NumberCell(f"{best.counts[number]:,}", best.counts[number]),
                NumberCell(f"{before:.1%}", before),
                NumberCell(f"{after:.1%}", after),
                NumberCell(signed_points(change), change),
                _confused(history, best, number),
            )
            for change, number, before, after in shown
        ),
        title="Classes that changed most",
        cards=True,
        sortable=True,
    )


def _confused(history: History, evaluation: RoundEvaluation, true: int) -> str:
    """Return the classes that a class is most often misclassified as, with image counts."""
    wrong = sorted(
        (-count, predicted)
        for (label, predicted), count in evaluation.confusion().items()
        if label == true != predicted
    )
    names = [
        f"{history.class_name(number)} ({-count:,})" for count, number in wrong[:MAX_CONFUSIONS]
    ]
    return ", ".join(names) or "none"
