"""``export``: write MODEL in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.export import format_of, onnx_bytes, state_dict_bytes, torch_export_bytes
from job.artifacts.export_card import ExportedModel, base_of_run, card_path, export_readme
from job.artifacts.model_card import find_model
from job.artifacts.provenance import find_dataset_table
from job.cli.command_options import QuantisationOptions
from job.cli.export_int8 import check_int8, int8_bytes
from job.cli.model import open_model
from job.console import counted, say
from job.errors import shown
from job.files import check_output, write_output

if TYPE_CHECKING:
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions


def export(
    model: ModelOptions,
    output: str,
    format: str | None = None,
    *,
    card: bool = True,
    quantisation: QuantisationOptions | None = None,
) -> None:
    """Compare the exported network with the original one, and write it to ``output``.

    By default the format follows from the suffix of ``output``. With ``card``, a README is written
    next to it, unless it is a pipe or a device. Raises UsageError if ``format`` and the suffix
    contradict each other. ``quantisation`` can make an ONNX model an 8-bit one.
    """
    format = format_of(Path(output), format)
    check_output(Path(output))
    quantisation = quantisation or QuantisationOptions()
    check_int8(format, quantisation)
    if quantisation.int8:
        described, content, how = int8_bytes(model, quantisation)
    else:
        network, described = open_model(model)
        content, how = _exported(network, described, format, Path(output).suffix)
    is_stream = Path(output).exists() and not Path(output).is_file()
    write_output(Path(output), content)
    # StudentNet(width_mult=…) needs all digits
    width = repr(described.width) if described.model == "student" else f"{described.width:.4f}"
    say(f"{described.model} at width {width}: {how} in {shown(output)}")
    if card and not is_stream:
        int8 = how if quantisation.int8 else ""
        say(f"model card: {shown(_write_card(model, described, Path(output), format, int8))}")


def _write_card(model: ModelOptions, card: ModelCard, output: Path, format: str, int8: str) -> Path:
    """Write the README of an exported model next to it; return its path."""
    base, data = None, None
    if Path(model.path).is_dir():
        base = base_of_run(find_model(model.path))
        data = find_dataset_table(model.path, card.lineage)
    exported = ExportedModel(output.name, format, card, data, base, int8)
    path = card_path(output)
    write_output(path, export_readme(exported).encode())
    return path


def _exported(network: nn.Module, card: ModelCard, format: str, suffix: str) -> tuple[bytes, str]:
    if format == "onnx":
        return onnx_bytes(network, card)
    if format == "torch-export":
        return torch_export_bytes(network, card)
    return state_dict_bytes(network, suffix), counted(len(network.state_dict()), "tensor")
