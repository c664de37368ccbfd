"""A network as other programs take it: a state dict, ONNX, or torch's exported program.

Each is the content of a file, made in memory and checked there before anything is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as safetensors_bytes

from job.artifacts.model_card import unshared
from job.artifacts.versions import package_versions
from job.errors import GammaslimError, UsageError, reason, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

    from job.artifacts.model_card import ModelCard

FORMATS = ("state-dict", "onnx", "torch-export")
SUFFIXES = {
    ".onnx": "onnx", ".pt2": "torch-export",
    **dict.fromkeys((".safetensors", ".pt", ".pth", ".bin"), "state-dict"),
}  # fmt: skip
OPSET = 18
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4  # relative to the largest logit, between runtimes in float32
BATCHES = (1, 3)  # sizes that an exported network is compared at; it is traced at 2
EXTRA_FILE = "gammaslim.json"  # in a .pt2: what ONNX holds as metadata_props


def format_of(path: Path, asked: str | None) -> str:
    """The format to write ``path`` in: as its suffix says, or as ``asked``.

    A file without a suffix, as a pipe, gets a state dict. Raises UsageError for a suffix of another
    format, or an unknown one when nothing is asked for.
    """
    own = SUFFIXES.get(path.suffix.lower())
    if asked is None:
        if path.suffix and own is None:
            known = ", ".join(f"{suffix} ({format})" for suffix, format in SUFFIXES.items())
            raise UsageError(
                f"--output {shown(path)}: {path.suffix} is not a format; give --format, or one of "
                f"{known}"
            )
        return own or "state-dict"
    if own not in (None, asked):
        suffix = next(suffix for suffix, format in SUFFIXES.items() if format == asked)
        raise UsageError(
            f"--format {asked} and --output {shown(path)} contradict each other: {path.suffix} is "
            f"{own}; name the file {shown(path.with_suffix(suffix).name)}, or leave out --format"
        )
    return asked


def state_dict_bytes(network: nn.Module, suffix: str) -> bytes:
    """The state dict: safetensors for that ``suffix``, else what torch.save writes."""
    state = unshared(network.state_dict())
    if suffix.lower() == ".safetensors":
        content: bytes = safetensors_bytes(state, {"format": "pt"})
        return content
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def onnx_bytes(network: nn.Module, card: ModelCard) -> tuple[bytes, str]:
    """ONNX of opset 18, ``images`` (B, 3, H, W) float32 -> ``logits`` (B, N); how it was checked.

    Raises UsageError without the packages or for a network that cannot be expressed, and
    GammaslimError when onnxruntime computes something else than torch.
    """
    if not (_installed("onnx") and _installed("onnxscript")):
        raise UsageError(
            "--format onnx needs the packages onnx and onnxscript: pip install 'gammaslim[onnx]'"
        )
    import onnx

    with _tracing("onnx"):
        program = torch.onnx.export(
            network,
            (_images(card, 2),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, _strings(metadata(card)))
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    if not _installed("onnxruntime"):
        return content, "not compared: onnxruntime is not installed"
    return content, _compare("onnxruntime", network, card, _onnx_runner(content))


def torch_export_bytes(network: nn.Module, card: ModelCard) -> tuple[bytes, str]:
    """A .pt2 of torch.export.save, which needs no code of the network; how it was checked.

    Raises UsageError for a network that cannot be traced, GammaslimError when it computes
    something else than the network.
    """
    with _tracing("torch-export"):
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(network, (_images(card, 2),), dynamic_shapes=shapes)
        buffer = io.BytesIO()
        extra = {EXTRA_FILE: json.dumps(metadata(card))}
        torch.export.save(program, buffer, extra_files=extra)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
    return buffer.getvalue(), _compare("torch.export.load", network, card, loaded)


def metadata(card: ModelCard) -> dict[str, Any]:
    """What a user of the file must know: how pictures become inputs, what the logits stand for."""
    return {
        "model": card.model,
        "args": card.args,
        "width": card.width,
        "num_classes": card.num_classes,
        "class_names": list(card.class_names),
        "input": card.preprocessing.to_dict(),
        "versions": package_versions(),
    }


def _strings(values: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }


def _images(card: ModelCard, count: int) -> torch.Tensor:
    """Random pictures as the network takes them: (count, 3, H, W) float32."""
    size = card.preprocessing.size
    generator = torch.Generator().manual_seed(count)
    pictures = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return card.preprocessing.to_input(pictures).contiguous()


def _compare(
    runtime: str,
    network: nn.Module,
    card: ModelCard,
    run: Callable[[torch.Tensor], torch.Tensor],
) -> str:
    worst = 0.0
    for count in BATCHES:
        images = _images(card, count)
        with torch.no_grad():
            wanted, given = network(images), run(images)
        if given.shape != wanted.shape:
            raise GammaslimError(f"{runtime} gives {tuple(given.shape)} for {count} images")
        scale = wanted.abs().max().clamp_min(1)
        worst = max(worst, float((given - wanted).abs().max() / scale))
    if not worst <= TOLERANCE:  # nan, too
        raise GammaslimError(f"{runtime} differs from torch by {worst:.1e}; nothing is written")
    return f"the same logits by {runtime}: difference {worst:.1e}"


def _onnx_runner(content: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


@contextlib.contextmanager
def _tracing(format: str) -> Iterator[None]:
    """Keep the exporters' chatter off the console; raise UsageError, a line, for their failures."""
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
    except Exception as error:  # the exporters raise their own kinds, of several pages
        why = f"{type(error).__name__}: {reason(error)}"
        raise UsageError(f"--format {format} cannot express this network: {why}") from error
    finally:
        logging.disable(level)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
