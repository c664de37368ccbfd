"""The record of a round's evaluation: errors, γ, and images that base and slim model disagree on.

The network is not run again: the predictions are those of the round's best epoch.
"""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from PIL import Image

from job.artifacts.evaluation_record import ErrorRecord, ExampleImage, GammaBins, RoundEvaluation
from job.data.batches import FAILURES, IncompleteBatch, PlainImages
from job.data.splits import UNLABELLED
from job.errors import shown
from job.training.gamma import gamma_histogram, gamma_layers, gamma_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from job.data.preprocessing import Preprocessing
    from job.data.splits import Split

MAX_EXAMPLES = 8  # images that only the base classifies correctly, and as many the other way round
THUMBNAIL = 96  # pixels of the longer side, at most
LOSSLESS = 48  # pixels up to which PNG is the smaller format


def evaluate_round(
    network: nn.Module,
    predictions: torch.Tensor,
    split: Split,
    preprocessing: Preprocessing,
    num_classes: int,
    base: RoundEvaluation | None,
) -> RoundEvaluation:
    """Return the record of ``network``, whose ``predictions`` (N,) are in the order of ``split``.

    ``base`` is the record of the base; None for the base itself, or where it has none.
    """
    labels = torch.from_numpy(split.labels)
    predictions, readable = predictions.cpu(), predictions.cpu() != UNLABELLED
    wrong = readable & (predictions != labels)
    counts = torch.bincount(labels[readable], minlength=num_classes)
    index = wrong.nonzero().flatten()
    errors = ErrorRecord(
        *(tuple(values.tolist()) for values in (index, labels[index], predictions[index]))
    )
    histogram = gamma_histogram(gamma_parameters(network, gamma_layers(network)))
    gamma = GammaBins(**asdict(histogram)) if histogram.count else None
    if base is None or max(base.errors.index, default=0) >= len(labels):
        return RoundEvaluation(tuple(counts.tolist()), errors, gamma)
    before = labels.clone()
    wrong_before = torch.tensor(base.errors.index, dtype=torch.int64)
    before[wrong_before] = torch.tensor(base.errors.predicted, dtype=torch.int64)
    lost = (wrong & (before == labels)).nonzero().flatten()
    won = (readable & ~wrong & (before != labels)).nonzero().flatten()
    chosen = [*_spread(lost, labels), *_spread(won, labels)]
    images = _thumbnails(split, preprocessing, chosen)
    examples = tuple(
        ExampleImage(
            shown(split.name(i)), int(labels[i]), int(before[i]), int(predictions[i]), image
        )
        for i, image in zip(chosen, images, strict=False)
    )
    return RoundEvaluation(
        tuple(counts.tolist()), errors, gamma, len(lost), len(won), examples=examples
    )


def _spread(indices: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Return up to MAX_EXAMPLES of ``indices``, spread over the classes."""
    ordered = indices[labels[indices].argsort(stable=True)].tolist()
    count = min(MAX_EXAMPLES, len(ordered))
    return [ordered[number * len(ordered) // count] for number in range(count)]


def _thumbnails(split: Split, preprocessing: Preprocessing, indices: Sequence[int]) -> list[str]:
    """Return small copies of images as data URLs; none if an image can no longer be read."""
    if not indices:
        return []
    found = PlainImages(split, preprocessing).__getitems__(list(indices))
    if isinstance(found, FAILURES):
        return []
    pixels, _labels = found.batch if isinstance(found, IncompleteBatch) else found
    return [_data_url(Image.fromarray(image.numpy())) for image in pixels]


def _data_url(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "png" if max(image.size) <= LOSSLESS else "jpeg"
    content = io.BytesIO()
    image.save(content, kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{b64encode(content.getvalue()).decode()}"
