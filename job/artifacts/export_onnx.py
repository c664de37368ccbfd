"""Export of a network to ONNX: in one file, or with the weights in a second file next to it."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from job.artifacts.export import (
    INPUT_NAME,
    ExportedOutputs,
    compare,
    export_metadata,
    installed,
    metadata_strings,
    outputs_of,
    random_inputs,
    tracing,
    with_named_outputs,
)
from job.errors import UsageError, writing
from job.files import sync_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from job.artifacts.model_card import ModelCard

ONNX_OPSET = 18
ONE_FILE = 2**31 - 2**24  # bytes of weights: protobuf takes files below 2 GiB, the graph included


def needs_data_file(network: nn.Module) -> bool:
    """Return whether the weights are too large for an ONNX model in one file."""
    size: int = sum(tensor.nbytes for tensor in network.state_dict().values())
    return size > ONE_FILE


def onnx_bytes(network: nn.Module, card: ModelCard) -> tuple[bytes, str]:
    """Return an ONNX model of opset 18, and how it was checked.

    The input is ``images`` (B, 3, H, W) float32, the output ``logits`` (B, N). Raises UsageError
    without the packages, for a network that ONNX cannot express, and for one of 2 GiB or more,
    GammaslimError when onnxruntime gives other logits than torch.
    """
    if needs_data_file(network):
        raise UsageError("the network has 2 GiB or more: an ONNX model in one file cannot hold it")
    network, program = _onnx_program(network, card)
    import onnx

    model = program.model_proto
    onnx.helper.set_model_props(model, metadata_strings(export_metadata(card)))
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content, _compared(network, card, content)


def onnx_with_data(network: nn.Module, card: ModelCard, output: Path) -> tuple[bytes, str]:
    """Write the weights to ``OUTPUT.data``, and return the ONNX model that names this file.

    Otherwise as `onnx_bytes`; raises StorageError if the weights cannot be written.
    """
    network, program = _onnx_program(network, card)
    import onnx

    program.model.metadata_props.update(metadata_strings(export_metadata(card)))
    with writing(output), TemporaryDirectory(dir=output.parent, prefix=".onnx.") as folder:
        path = output.parent / folder / output.name
        program.save(path, external_data=True)
        onnx.checker.check_model(str(path))
        how = _compared(network, card, str(path))
        data = path.with_name(f"{path.name}.data")
        sync_path(data)
        data.replace(output.with_name(data.name))
        return path.read_bytes(), how


def _onnx_program(network: nn.Module, card: ModelCard) -> tuple[nn.Module, Any]:
    """Return the network with named outputs, and its `torch.onnx.ONNXProgram`."""
    if not (installed("onnx") and installed("onnxscript")):
        raise UsageError(
            "--format onnx needs the packages onnx and onnxscript: pip install 'gammaslim[onnx]'"
        )
    network, names = with_named_outputs(network, card)
    with tracing("onnx"):
        program = torch.onnx.export(
            network,
            (random_inputs(card, 2),),
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=[INPUT_NAME],
            output_names=names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    return network, program


def _compared(network: nn.Module, card: ModelCard, model: bytes | str) -> str:
    """Return how the logits of an ONNX model, or of a file, compare with those of the network."""
    if not installed("onnxruntime"):
        return "not compared: onnxruntime is not installed"
    return compare("onnxruntime", network, card, open_onnx(model))


def open_onnx(model: bytes | str) -> Callable[[torch.Tensor], ExportedOutputs]:
    """Open an ONNX model or file in onnxruntime, on the CPU: a function from images to outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    names = [output.name for output in session.get_outputs()]

    def run(images: torch.Tensor) -> ExportedOutputs:
        arrays = session.run(names, {INPUT_NAME: images.numpy()})
        return outputs_of(dict(zip(names, map(torch.from_numpy, arrays), strict=True)))

    return run
