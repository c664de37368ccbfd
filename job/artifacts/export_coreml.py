"""Export of a network to Core ML: NAME.mlpackage, a folder with an ML program in float32."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path
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
from job.errors import OutputError, UsageError, shown
from job.files import check_writable, new_directory, sync_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from job.artifacts.model_card import ModelCard

MAX_BATCH = 64  # images; an ML program has no dimension without a bound
MANIFEST = "Manifest.json"  # in every package


def check_coreml(output: Path) -> None:
    """Raise UsageError without coremltools, or if ``output`` does not end in ``.mlpackage``.

    Raises OutputError or StorageError if ``output`` cannot be written, or is no package.
    """
    if not installed("coremltools"):
        raise UsageError(
            "--format coreml needs the package coremltools: pip install 'gammaslim[coreml]'"
        )
    if output.suffix.lower() != ".mlpackage":
        raise UsageError(
            "--format coreml writes a folder, NAME.mlpackage: give --output "
            f"{shown(output.with_suffix('.mlpackage'))}"
        )
    if output.is_symlink() or (output.exists() and not (output / MANIFEST).is_file()):
        raise OutputError(
            f"--output {shown(output)} exists and is not a Core ML package: give another name"
        )
    check_writable(output.absolute().parent)


def write_coreml(network: nn.Module, card: ModelCard, output: Path) -> str:
    """Write a Core ML model to the folder ``output``; return how it was checked.

    The input is ``images`` (B, 3, H, W) float32 with B up to 64, the output ``logits`` (B, N). The
    program of torch.export that is converted is compared with the network, and on macOS the
    converted model too. Raises UsageError for a network that Core ML cannot express,
    GammaslimError when either gives other logits than torch, StorageError.
    """
    network, names = with_named_outputs(network, card)
    with tracing("coreml"):
        program = _program(network, card)
    how = compare("torch.export", network, card, program.module())
    with tracing("coreml"), contextlib.redirect_stderr(io.StringIO()):  # bars of progress
        model = _converted(program, names)
    model.user_defined_metadata.update(metadata_strings(export_metadata(card)))
    if _runs_here():
        how = compare("Core ML", network, card, lambda images: _predicted(model, images, names))
    else:
        how += " (Core ML itself runs on macOS only and is not compared)"
    with TemporaryDirectory(prefix="gammaslim-") as folder, new_directory(output) as package:
        whole = Path(folder) / "m.mlpackage"
        model.save(str(whole))
        shutil.copytree(whole, package, dirs_exist_ok=True)
        for path in package.rglob("*"):
            sync_path(path)
    return how


class _Named(torch.nn.Module):
    """Network whose input has the name that the Core ML model takes from its argument."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> Any:
        return self.network(images)


def _program(network: nn.Module, card: ModelCard) -> torch.export.ExportedProgram:
    """Trace a network in the operations that coremltools converts."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    inputs = (random_inputs(card, 2),)
    traced = torch.export.export(_Named(network).eval(), inputs, dynamic_shapes=shapes)
    program: torch.export.ExportedProgram = traced.run_decompositions({})
    return program


def _converted(program: torch.export.ExportedProgram, names: Sequence[str]) -> Any:
    """Return the `coremltools.models.MLModel` of a program, in float32."""
    import coremltools

    assert INPUT_NAME == "images"  # the argument of `_Named`
    return coremltools.convert(
        program,
        convert_to="mlprogram",
        outputs=[coremltools.TensorType(name) for name in names],
        compute_precision=coremltools.precision.FLOAT32,  # the default, float16, differs by 1e-3
        compute_units=coremltools.ComputeUnit.CPU_ONLY,  # of the comparison; it is not stored
        skip_model_load=not _runs_here(),
    )


def _runs_here() -> bool:
    return sys.platform == "darwin"


def _predicted(model: Any, images: torch.Tensor, names: Sequence[str]) -> ExportedOutputs:
    arrays = model.predict({INPUT_NAME: images.numpy()})
    return outputs_of({name: torch.from_numpy(arrays[name]) for name in names})
