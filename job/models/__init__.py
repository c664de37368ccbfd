"""Networks by name, and weights files read without executing anything in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from job.errors import UsageError, reason
from job.models.student import StudentNet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

MODELS = {"student": StudentNet}
MIN_SIZE = 32  # pixels: StudentNet halves its input four times and BatchNorm needs two values
MAX_SIZE = 4096  # pixels: a single input of StudentNet's takes about a GiB


def build(name: str, num_classes: int, args: Mapping[str, Any]) -> nn.Module:
    """The network ``name`` with fresh weights; raises UsageError for what it does not take."""
    if name not in MODELS:
        raise UsageError(f"--model {name!r} is unknown; models: {', '.join(MODELS)}")
    try:
        return MODELS[name](num_classes=num_classes, **args)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        given = " ".join(f"--model-arg {key}={value}" for key, value in args.items())
        raise UsageError(f"--model {name} does not take {given}: {reason(error)}") from error
