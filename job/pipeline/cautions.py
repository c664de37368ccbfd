"""Accuracies that are likely to mean a mistake: at chance, one class only, far above the base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from job.artifacts.accuracy import change, signed
from job.errors import shown
from job.training.evaluation import Evaluator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.artifacts.records import RoundRecord
    from job.config import PruneConfig
    from job.data.dataset import Dataset
    from job.training.evaluation import Evaluation

SIGMAS = 2.0  # standard deviations of binomial noise that say nothing
LOW = 0.4  # of the way from chance to all right: trained weights mostly score more
CLEARLY = 0.1  # above chance: only few images leave it in doubt
SAMPLE = 512  # images that tell whether weights score at all
PREPROCESSING = (
    "is the preprocessing the one they were trained with? see --mean, --std, --transform"
)


def of_weights(accuracy: float, counts: Sequence[int]) -> str | None:
    """A caution where weights score low on images whose true classes have ``counts`` images."""
    if near := at_chance("the weights score", accuracy, counts):
        return f"{near}: {PREPROCESSING}"
    classes = _present(counts)
    if classes > 1 and accuracy < 1 / classes + LOW * (1 - 1 / classes):
        return f"the weights score {accuracy:.1%}, low for {classes} classes: {PREPROCESSING}"
    return None


def of_model(accuracy: float, counts: Sequence[int], *, weights: bool) -> str | None:
    """A caution about a model's score, which is from a folder or is a file of ``weights``."""
    if weights:
        return of_weights(accuracy, counts)
    near = at_chance("the model scores", accuracy, counts)
    same = "are the data and the preprocessing as they were in training?"
    return f"{near}: {same}" if near else None


def at_chance(subject: str, accuracy: float, counts: Sequence[int]) -> str | None:
    """What ``subject`` scores, where one that always gives the commonest class does as well."""
    total = sum(counts)
    if _present(counts) < 2:
        return None
    chance = max(counts) / total
    if accuracy > chance + SIGMAS * math.sqrt(chance * (1 - chance) / total):
        return None
    few = f" as far as {total} images can tell" if accuracy > chance + CLEARLY else ""
    return f"{subject} {accuracy:.1%}, near chance for {_present(counts)} classes{few}"


def one_class(result: Evaluation, names: Sequence[str]) -> str | None:
    """A caution where all images of several classes are taken for one."""
    predicted = result.confusion.sum(0).nonzero().flatten().tolist()
    if len(predicted) != 1 or _present(result.confusion.sum(1).tolist()) < 2:
        return None
    (number,) = predicted
    name = shown(names[number]) if number < len(names) else number
    return f"the class {name} is predicted for every image"


def above_base(entries: Sequence[RoundRecord], count: int, weights: bool) -> str | None:
    """A caution where a round beats the base, first of ``entries``, by more than noise.

    ``count`` is how many validation images there are, ``weights`` whether the base had any.
    """
    base = entries[0].valid_acc
    best = max(entries, key=lambda entry: entry.valid_acc)
    high = best.valid_acc
    noise = SIGMAS * math.sqrt((base * (1 - base) + high * (1 - high)) / count)
    if high - base <= noise:
        return None
    why = ", or its preprocessing is not the one it was trained with" if weights else ""
    return (
        f"round {best.round} is {signed(change(high, base))} points above the base, more than "
        f"noise ({100 * noise:.1f} at {count:,} images): the base is under-trained{why}"
    )


def of_sample(evaluator: Evaluator, network: nn.Module) -> str | None:
    """A caution where the weights of ``network`` score low on a sample of the split; collective."""
    split = evaluator.split
    sample = split.select(np.linspace(0, len(split) - 1, min(len(split), SAMPLE)).astype(np.intp))
    how = evaluator.preprocessing, evaluator.accelerator
    with torch.random.fork_rng(devices=[]):  # a loader draws a random number
        result = Evaluator(sample, evaluator.num_classes, *how, workers=0)(network)
    return of_weights(result.accuracy, result.confusion.sum(1).tolist())


@dataclass(frozen=True)
class Cautions:
    """What a run's cautions depend on: its validation images, and what the base is."""

    counts: Sequence[int]  # validation images of each class
    names: Sequence[str]
    weights: bool  # the base had weights
    given: bool  # and is as they are, the classifier included

    @classmethod
    def of(cls, config: PruneConfig, data: Dataset, card: ModelCard) -> Cautions:
        """Those of a run from the base of ``card``."""
        counts: list[int] = np.bincount(data.splits["validation"].labels).tolist()
        trained = config.first_epochs + config.sparsity_epochs
        whole = bool(config.weights) and not card.lineage.get("fresh_classifier")
        return cls(counts, data.class_names, bool(config.weights), whole and not trained)

    def of_base(self, result: Evaluation) -> list[str]:
        """Of a base that is not trained."""
        check = of_weights if self.given else self._base
        return _there(check(result.accuracy, self.counts), one_class(result, self.names))

    def of_round(
        self, round_: int, accuracy: float, evaluate: Callable[[], Evaluation]
    ) -> list[str]:
        """Of a network that was trained, the base too; ``evaluate`` is called only in doubt."""
        subject = f"round {round_} scores" if round_ else "the base scores"
        near = at_chance(subject, accuracy, self.counts)
        if not near:
            return []
        with torch.random.fork_rng(devices=[]):  # a loader draws a random number
            return _there(near, one_class(evaluate(), self.names))

    def of_run(self, entries: Sequence[RoundRecord]) -> list[str]:
        """Those that the entries of the base and the rounds keep, and of the rounds together."""
        kept = [caution for entry in entries for caution in entry.cautions]
        return kept + _there(above_base(entries, sum(self.counts), self.weights))

    @staticmethod
    def _base(accuracy: float, counts: Sequence[int]) -> str | None:
        return at_chance("the base scores", accuracy, counts)


def _there(*cautions: str | None) -> list[str]:
    return [caution for caution in cautions if caution]


def _present(counts: Sequence[int]) -> int:
    return sum(count > 0 for count in counts)
