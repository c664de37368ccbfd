"""``export``: write MODEL in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.export import format_of, onnx_bytes, state_dict_bytes, torch_export_bytes
from job.cli.model import open_model
from job.console import counted, say
from job.errors import shown
from job.files import check_output, write_output

if TYPE_CHECKING:
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions


def export(model: ModelOptions, output: str, format: str | None = None) -> None:
    """Compare the exported network with the original one, and write it to ``output``.

    By default the format follows from the suffix of ``output``. Raises UsageError if ``format`` and
    the suffix contradict each other.
    """
    format = format_of(Path(output), format)
    check_output(Path(output))
    network, card = open_model(model)
    content, how = _exported(network, card, format, Path(output).suffix)
    write_output(Path(output), content)
    # StudentNet(width_mult=…) needs all digits
    width = repr(card.width) if card.model == "student" else f"{card.width:.4f}"
    say(f"{card.model} at width {width}: {how} in {shown(output)}")


def _exported(network: nn.Module, card: ModelCard, format: str, suffix: str) -> tuple[bytes, str]:
    if format == "onnx":
        return onnx_bytes(network, card)
    if format == "torch-export":
        return torch_export_bytes(network, card)
    return state_dict_bytes(network, suffix), counted(len(network.state_dict()), "tensor")
