"""Export of a network to other formats: state dict, torch.export, and what all formats share.

Each function returns the content of a file, which is checked in memory before it is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from safetensors.torch import save as safetensors_bytes

from job.artifacts.model_card import unshare_tensors
from job.artifacts.versions import package_versions
from job.config import DETECTION
from job.errors import GammaslimError, UsageError, reason, shown
from job.models.detectors import joined_outputs
from job.models.outputs import main_output, named_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.data.preprocessing import PreprocessingRecord

EXPORT_FORMATS = ("state-dict", "onnx", "torch-export", "openvino", "coreml")
FORMAT_BY_SUFFIX = {
    ".onnx": "onnx", ".pt2": "torch-export", ".xml": "openvino", ".mlpackage": "coreml",
    **dict.fromkeys((".safetensors", ".pt", ".pth", ".bin"), "state-dict"),
}  # fmt: skip
INPUT_NAME, OUTPUT_NAME = "images", "logits"
TOLERANCE = 1e-4  # relative to the largest logit, between runtimes in float32
BATCHES = (1, 3)  # sizes for comparing an exported network; it is traced with 2 images
EXTRA_FILE = "gammaslim.json"  # in a .pt2; ONNX has metadata_props
ExportedOutputs = torch.Tensor | dict[str, torch.Tensor]


class ExportMetadata(TypedDict):
    """Metadata of an exported file: preprocessing of images, names of classes."""

    model: str
    args: Mapping[str, Any]
    width: float
    num_classes: int
    class_names: list[str]
    input: PreprocessingRecord
    versions: dict[str, str]


def format_of(path: Path, asked: str | None) -> str:
    """Return the format for ``path``: the one ``asked`` for, or that of the suffix.

    A file without a suffix, e.g. a pipe, gets a state dict. Raises UsageError for a suffix of
    another format, or an unknown suffix when no format is asked for.
    """
    by_suffix = FORMAT_BY_SUFFIX.get(path.suffix.lower())
    if asked is None:
        if path.suffix and by_suffix is None:
            known = ", ".join(f"{suffix} ({format})" for suffix, format in FORMAT_BY_SUFFIX.items())
            raise UsageError(
                f"--output {shown(path)}: unknown suffix {path.suffix}; give --format, or one of "
                f"{known}"
            )
        return by_suffix or "state-dict"
    if by_suffix not in (None, asked):
        suffix = next(suffix for suffix, format in FORMAT_BY_SUFFIX.items() if format == asked)
        raise UsageError(
            f"--format {asked} and --output {shown(path)} contradict each other: {path.suffix} is "
            f"{by_suffix}; name the file {shown(path.with_suffix(suffix).name)}, or leave out "
            "--format"
        )
    return asked


def state_dict_bytes(network: nn.Module, suffix: str) -> bytes:
    """Return the state dict, as safetensors for the suffix .safetensors, else as a torch file."""
    state = unshare_tensors(network.state_dict())
    if suffix.lower() == ".safetensors":
        content: bytes = safetensors_bytes(state, {"format": "pt"})
        return content
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def torch_export_bytes(network: nn.Module, card: ModelCard) -> tuple[bytes, str]:
    """Return a .pt2 of torch.export.save, and how it was checked; it needs no code of the network.

    Raises UsageError for a network that cannot be traced, GammaslimError when the exported program
    gives other logits than the network.
    """
    network, _ = with_named_outputs(network, card)
    with tracing("torch-export"):
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(network, (random_inputs(card, 2),), dynamic_shapes=shapes)
        buffer = io.BytesIO()
        extra = {EXTRA_FILE: json.dumps(export_metadata(card))}
        torch.export.save(program, buffer, extra_files=extra)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
    return buffer.getvalue(), compare("torch.export.load", network, card, loaded)


class _MainOutput(torch.nn.Module):
    """Network that returns the main one of several outputs, e.g. ``out`` of a dict."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> Any:
        return main_output(self.network(images))


class _NamedOutputs(torch.nn.Module):
    """Network that returns a dict of the tensors that another one returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return named_outputs(self.network(images))


class _JoinedOutputs(torch.nn.Module):
    """Detector that returns its raw outputs as one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return joined_outputs(self.network(images))


def with_named_outputs(network: nn.Module, card: ModelCard) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network to export, and the names of its outputs.

    It returns one tensor, ``logits``; for tasks of the user, a dict if there are several. Raises
    UsageError for a detector without raw outputs.
    """
    with torch.no_grad():
        outputs = network(random_inputs(card, 1))
    if card.task == DETECTION:
        joined_outputs(outputs)
        return _JoinedOutputs(network).eval(), (OUTPUT_NAME,)
    if isinstance(outputs, torch.Tensor):
        return network, (OUTPUT_NAME,)
    names = tuple(named_outputs(outputs))
    if len(names) > 1 and ":" in card.task:  # module:factory
        return _NamedOutputs(network).eval(), names
    return _MainOutput(network).eval(), (OUTPUT_NAME,)


def export_metadata(card: ModelCard) -> ExportMetadata:
    """Return the metadata of an exported file."""
    return {
        "model": card.model,
        "args": card.args,
        "width": card.width,
        "num_classes": card.num_classes,
        "class_names": list(card.class_names),
        "input": card.preprocessing.to_dict(),
        "versions": package_versions(),
    }


def metadata_strings(values: Mapping[str, object]) -> dict[str, str]:
    """Return metadata as strings: values that are not strings are written as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }


def random_inputs(card: ModelCard, count: int) -> torch.Tensor:
    """Return random inputs of the network: (count, 3, H, W), or (count, *shape), float32."""
    size = card.preprocessing.size
    generator = torch.Generator().manual_seed(count)
    if shape := card.preprocessing.shape:
        return torch.rand(count, *shape, generator=generator)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return card.preprocessing.to_input(pixels).contiguous()


def compare(
    runtime: str,
    network: nn.Module,
    card: ModelCard,
    run: Callable[[torch.Tensor], ExportedOutputs],
) -> str:
    """Compare the outputs of ``run``, another runtime, with the network's; describe the result.

    Raises GammaslimError if they differ by more than TOLERANCE.
    """
    worst = 0.0
    for count in BATCHES:
        images = random_inputs(card, count)
        with torch.no_grad():
            expected, actual = by_name(network(images)), by_name(run(images))
        for name, values in expected.items():
            if name not in actual or actual[name].shape != values.shape:
                shapes = {key: tuple(tensor.shape) for key, tensor in actual.items()}
                raise GammaslimError(f"{runtime} gives {shapes} for {count} images")
            scale = values.abs().max().clamp_min(1)
            worst = max(worst, float((actual[name] - values).abs().max() / scale))
    if not worst <= TOLERANCE:  # also for NaN
        raise GammaslimError(f"{runtime} differs from torch by {worst:.1e}; nothing is written")
    return f"{runtime} gives the same {', '.join(expected)}: relative difference {worst:.1e}"


def by_name(outputs: ExportedOutputs) -> dict[str, torch.Tensor]:
    """Return outputs by name; a single tensor is the logits."""
    return {OUTPUT_NAME: outputs} if isinstance(outputs, torch.Tensor) else outputs


def outputs_of(tensors: Mapping[str, torch.Tensor]) -> ExportedOutputs:
    """Return a single tensor, or several by name."""
    return next(iter(tensors.values())) if len(tensors) == 1 else dict(tensors)


@contextlib.contextmanager
def tracing(format: str) -> Iterator[None]:
    """Silence the exporters, and turn their exceptions into a UsageError of one line."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,  # noqa: PTH123
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the exporters raise errors of their own, some with pages of text
        why = f"{type(error).__name__}: {reason(error)}"
        raise UsageError(f"--format {format} cannot express this network: {why}") from error
    finally:
        logging.disable(level)


def installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None
