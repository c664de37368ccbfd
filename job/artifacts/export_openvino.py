"""Export of a network to OpenVINO: NAME.xml, the graph, and NAME.bin, the weights."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from job.artifacts.export import (
    INPUT_NAME,
    ExportedOutputs,
    compare,
    export_metadata,
    installed,
    metadata_strings,
    outputs_of,
    with_named_outputs,
)
from job.artifacts.export_onnx import onnx_bytes
from job.errors import GammaslimError, OutputError, UsageError, reason, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from job.artifacts.model_card import ModelCard

METADATA_KEY = "gammaslim"  # of the rt_info of the .xml file


class OpenVinoFiles(NamedTuple):
    """The contents of both files, and how they were checked."""

    graph: bytes
    weights: bytes
    how: str


def check_openvino(output: Path) -> None:
    """Raise UsageError without the packages, or if ``output`` does not end in ``.xml``.

    Raises OutputError if the weights would replace a file of another model.
    """
    if not (installed("openvino") and installed("onnx") and installed("onnxscript")):
        raise UsageError(
            "--format openvino needs the packages openvino, onnx and onnxscript: "
            "pip install 'gammaslim[openvino]'"
        )
    if output.suffix.lower() != ".xml":
        raise UsageError(
            "--format openvino writes two files, NAME.xml and NAME.bin: give --output "
            f"{shown(output.with_suffix('.xml'))}"
        )
    weights = output.with_suffix(".bin")
    if weights.exists() and not output.exists():
        raise OutputError(
            f"{shown(weights)}, where the weights would be written, is a file of another model: "
            "give --output another name"
        )


def openvino_files(network: nn.Module, card: ModelCard) -> OpenVinoFiles:
    """Return the files of an OpenVINO model in float32, which is read from an ONNX model.

    The input is ``images`` (B, 3, H, W) float32, the output ``logits`` (B, N). Raises UsageError
    for a network that ONNX or OpenVINO cannot express, GammaslimError when OpenVINO gives other
    logits than torch.
    """
    content, _ = onnx_bytes(network, card)
    import openvino

    try:
        model = openvino.Core().read_model(io.BytesIO(content))
        for key, value in metadata_strings(export_metadata(card)).items():
            model.set_rt_info(value, [METADATA_KEY, key])
        with tempfile.TemporaryDirectory(prefix="gammaslim-") as folder:
            graph, weights = Path(folder) / "m.xml", Path(folder) / "m.bin"
            openvino.serialize(model, graph, weights)
            files = graph.read_bytes(), weights.read_bytes()
            run = _open(graph)
            how = compare("openvino", with_named_outputs(network, card)[0], card, run)
    except GammaslimError:
        raise
    except RuntimeError as error:  # what openvino raises for all that it does not support
        why = reason(error)
        raise UsageError(f"--format openvino cannot express this network: {why}") from error
    return OpenVinoFiles(*files, how)


def _open(graph: Path) -> Callable[[torch.Tensor], ExportedOutputs]:
    """Open a model in OpenVINO, on the CPU in float32: a function from images to outputs."""
    import openvino

    # on some processors the default is bfloat16
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(graph, "CPU", options)

    names = [output.get_any_name() for output in compiled.outputs]

    def run(images: torch.Tensor) -> ExportedOutputs:
        arrays = compiled({INPUT_NAME: images.numpy()})
        return outputs_of({name: torch.from_numpy(arrays[name].copy()) for name in names})

    return run
