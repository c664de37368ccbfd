"""``export``: write MODEL to a file for PyTorch, ONNX, OpenVINO or Core ML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.export import (
    OUTPUT_NAME,
    format_of,
    state_dict_bytes,
    torch_export_bytes,
    with_named_outputs,
)
from job.artifacts.export_card import ExportedModel, base_of_run, card_path, export_readme
from job.artifacts.export_coreml import check_coreml, write_coreml
from job.artifacts.export_onnx import needs_data_file, onnx_bytes, onnx_with_data
from job.artifacts.export_openvino import check_openvino, openvino_files
from job.artifacts.model_card import find_model
from job.artifacts.provenance import find_dataset_table
from job.cli.command_options import QuantisationOptions
from job.cli.export_int8 import check_int8, int8_bytes
from job.cli.open_model import open_model
from job.console import counted, say
from job.errors import shown
from job.files import check_output, write_output

if TYPE_CHECKING:
    from torch import nn

    from job.artifacts.export_card import Quantisation
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
    """Write MODEL to ``output``, after comparing the exported network with the original one.

    By default the format follows from the suffix of ``output``. With ``card``, a model card is
    written next to ``output``, unless ``output`` is a pipe or a device. ``quantisation`` sets
    whether an ONNX model is quantised to 8 bits. Raises UsageError if ``format`` and the suffix
    contradict each other.
    """
    format = format_of(Path(output), format)
    if format == "coreml":
        check_coreml(Path(output))
    else:
        check_output(Path(output))
    quantisation = quantisation or QuantisationOptions()
    check_int8(format, quantisation)
    if format == "openvino":
        check_openvino(Path(output))
    outputs: tuple[str, ...] = (OUTPUT_NAME,)
    if quantisation.int8:
        described, content, int8, how = int8_bytes(model, quantisation)
        write_output(Path(output), content)
    else:
        network, described = open_model(model)
        int8 = None
        how = _write_exported(network, described, format, Path(output))
        if card and format != "state-dict":
            _, outputs = with_named_outputs(network, described)
    # a Core ML model is a folder
    is_stream = not (Path(output).is_file() or Path(output).is_dir())
    # StudentNet(width_mult=…) needs all digits
    width = repr(described.width) if described.model == "student" else f"{described.width:.4f}"
    say(f"{described.model} at width {width}: {how} in {shown(output)}")
    if card and not is_stream:
        path = _write_card(model, described, Path(output), format, outputs, int8)
        say(f"model card: {shown(path)}")


def _write_card(
    model: ModelOptions,
    card: ModelCard,
    output: Path,
    format: str,
    outputs: tuple[str, ...],
    int8: Quantisation | None,
) -> Path:
    """Write the README of an exported model next to it; return its path."""
    base, data = None, None
    if Path(model.path).is_dir():
        base = base_of_run(find_model(model.path))
        data = find_dataset_table(model.path, card.lineage)
    exported = ExportedModel(output.name, format, card, data, base, int8, outputs)
    path = card_path(output)
    write_output(path, export_readme(exported).encode())
    return path


def _write_exported(network: nn.Module, card: ModelCard, format: str, output: Path) -> str:
    """Write a network to ``output``; return how it was checked."""
    if format == "coreml":
        return write_coreml(network, card, output)
    content, how = _exported(network, card, format, output)
    write_output(output, content)
    return how


def _exported(network: nn.Module, card: ModelCard, format: str, output: Path) -> tuple[bytes, str]:
    """Return the content of ``output``, and how it was checked.

    The weights of an OpenVINO model, or of a large ONNX model, are written to a separate file
    first, because the graph in ``output`` refers to it.
    """
    if format == "onnx":
        if needs_data_file(network):
            return onnx_with_data(network, card, output)
        return onnx_bytes(network, card)
    if format == "torch-export":
        return torch_export_bytes(network, card)
    if format == "openvino":
        files = openvino_files(network, card)
        write_output(output.with_suffix(".bin"), files.weights)
        return files.graph, files.how
    content = state_dict_bytes(network, output.suffix)
    return content, counted(len(network.state_dict()), "tensor")
