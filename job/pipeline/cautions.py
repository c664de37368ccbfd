"""Cautions about accuracies that hint at a mistake: near chance, a single class, above the base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from job.artifacts.accuracy import accuracy_change, signed_points
from job.errors import shown
from job.training.evaluation import Evaluation, Evaluator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.artifacts.records import RoundRecord
    from job.config import PruneConfig
    from job.data.dataset import Dataset
    from job.training.objective import SplitScores

SIGMAS = 2.0  # standard deviations of binomial noise that a difference must exceed
LOW = 0.4  # fraction of the range from chance to 1; trained weights usually score higher
CLEAR_MARGIN = 0.1  # above chance; beyond it only a small number of images leaves doubt
SAMPLE = 512  # images of the sample that weights are tested on
PREPROCESSING = (
    "is the preprocessing the one they were trained with? see --mean, --std, --transform"
)


def weights_caution(accuracy: float, counts: Sequence[int]) -> str | None:
    """Return a caution when weights score low; ``counts`` are the images of each true class."""
    if near := chance_caution("the weights score", accuracy, counts):
        return f"{near}: {PREPROCESSING}"
    classes = _classes_present(counts)
    if classes > 1 and accuracy < 1 / classes + LOW * (1 - 1 / classes):
        return f"the weights score {accuracy:.1%}, low for {classes} classes: {PREPROCESSING}"
    return None


def model_caution(accuracy: float, counts: Sequence[int], *, weights: bool) -> str | None:
    """Return a caution when a model folder, or a file of ``weights``, scores low."""
    if weights:
        return weights_caution(accuracy, counts)
    near = chance_caution("the model scores", accuracy, counts)
    same = "are the data and the preprocessing as they were in training?"
    return f"{near}: {same}" if near else None


def chance_caution(subject: str, accuracy: float, counts: Sequence[int]) -> str | None:
    """Return a caution when always predicting the most common class scores as well."""
    total = sum(counts)
    if _classes_present(counts) < 2:
        return None
    chance = max(counts) / total
    if accuracy > chance + SIGMAS * math.sqrt(chance * (1 - chance) / total):
        return None
    few = f" as far as {total} images can tell" if accuracy > chance + CLEAR_MARGIN else ""
    return f"{subject} {accuracy:.1%}, near chance for {_classes_present(counts)} classes{few}"


def single_class_caution(result: Evaluation, names: Sequence[str], model: str = "") -> str | None:
    """Return a caution when images of several classes are all predicted as one by ``model``."""
    predicted = result.confusion.sum(0).nonzero().flatten().tolist()
    if len(predicted) != 1 or _classes_present(result.confusion.sum(1).tolist()) < 2:
        return None
    (number,) = predicted
    name = shown(names[number]) if number < len(names) else number
    by = f" by {model}" if model else ""
    return f"the class {name} is predicted for every image{by}"


def under_trained_caution(entries: Sequence[RoundRecord], count: int, weights: bool) -> str | None:
    """Return a caution when a round beats the base, first of ``entries``, by more than noise.

    ``count`` is the number of validation images.
    ``weights`` tells whether the base was loaded from ``--weights``.
    """
    best = max(entries, key=lambda entry: entry.valid_acc)
    base, high = entries[0].valid_acc, best.valid_acc
    noise = SIGMAS * math.sqrt((base * (1 - base) + high * (1 - high)) / count)
    if high - base <= noise:
        return None
    gain = signed_points(accuracy_change(high, base))
    why = ", or its preprocessing is not the one it was trained with" if weights else ""
    return (
        f"round {best.round} is {gain} points above the base, more than "
        f"noise ({100 * noise:.1f} at {count:,} images): the base is under-trained{why}"
    )


def sample_caution(evaluator: Evaluator, network: nn.Module) -> str | None:
    """Return a caution when ``network`` scores low on a sample of the split; collective."""
    split = evaluator.split
    sample = split.select(np.linspace(0, len(split) - 1, min(len(split), SAMPLE)).astype(np.intp))
    how = evaluator.preprocessing, evaluator.accelerator
    with torch.random.fork_rng(devices=[]):  # a loader draws a random number
        result = Evaluator(sample, evaluator.num_classes, *how, workers=0)(network)
    return weights_caution(result.accuracy, result.confusion.sum(1).tolist())


@dataclass(frozen=True)
class Cautions:
    """Computes the cautions of a run from its validation images and its base."""

    counts: Sequence[int]  # validation images of each class
    names: Sequence[str]
    weights: bool  # whether the base was loaded from --weights
    unchanged: bool  # whether the base, with its classifier, equals its weights

    @classmethod
    def of(cls, config: PruneConfig, data: Dataset, card: ModelCard) -> Cautions:
        """Return the cautions of a run whose base has ``card``; empty unless it is a classifier."""
        if not card.is_classifier:
            return cls((), (), weights=False, unchanged=False)
        counts: list[int] = np.bincount(data.splits["validation"].labels).tolist()
        trained = config.first_epochs + config.sparsity_epochs
        whole = bool(config.weights) and not card.lineage.fresh_classifier
        return cls(counts, data.class_names, bool(config.weights), whole and not trained)

    def of_base(self, result: Evaluation | SplitScores) -> list[str]:
        """Return the cautions about a base that is not trained."""
        if not isinstance(result, Evaluation):
            return []
        check = weights_caution if self.unchanged else self._base
        near = check(result.accuracy, self.counts)
        return _given(near, single_class_caution(result, self.names, "the base"))

    def of_round(self, round_index: int, accuracy: float, evaluate: Callable[[], Any]) -> list[str]:
        """Return the cautions about a trained network, which may be the base.

        ``evaluate`` is called only when the accuracy is in doubt.
        """
        model = f"round {round_index}" if round_index else "the base"
        near = chance_caution(f"{model} scores", accuracy, self.counts)
        if not near:
            return []
        with torch.random.fork_rng(devices=[]):  # a loader draws a random number
            return _given(near, single_class_caution(evaluate(), self.names, model))

    def of_run(self, entries: Sequence[RoundRecord]) -> list[str]:
        """Return the cautions of all entries, and the one about the whole run."""
        kept = [caution for entry in entries for caution in entry.cautions]
        if not self.counts:
            return kept
        return kept + _given(under_trained_caution(entries, sum(self.counts), self.weights))

    @staticmethod
    def _base(accuracy: float, counts: Sequence[int]) -> str | None:
        return chance_caution("the base scores", accuracy, counts)


def _given(*cautions: str | None) -> list[str]:
    return [caution for caution in cautions if caution]


def _classes_present(counts: Sequence[int]) -> int:
    return sum(count > 0 for count in counts)
