"""Runtimes of a network: torch eager, torch.compile, and onnxruntime."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from job.errors import GammaslimError, reason
from job.slimming.calibration.memory_format import set_memory_format

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

EAGER, COMPILED, ONNX = "eager", "compile", "onnxruntime"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass(frozen=True)
class Placement:
    """Placement of networks: device, and ``precision`` and ``memory_format`` of all tensors."""

    device: torch.device
    precision: str = "fp32"
    memory_format: str = "contiguous"

    def put(self, network: nn.Module) -> nn.Module:
        """Move a network in place, and return it."""
        network.to(self.device, DTYPES[self.precision])
        set_memory_format(network, FORMATS[self.memory_format])
        return network

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Return ``images`` (B, C, H, W) as a network of this placement takes them."""
        placed = images.to(self.device, DTYPES[self.precision])
        layout = FORMATS[self.memory_format]
        return placed.contiguous(memory_format=layout) if placed.dim() == 4 else placed


class OnnxSession(Protocol):
    """The methods of ``onnxruntime.InferenceSession`` that are used here."""

    def get_inputs(self) -> Sequence[Any]:
        """Return the inputs, which have a ``name`` and a ``shape``."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Return the outputs, for arrays by input name."""


class NotMeasured(GammaslimError):  # noqa: N818  (it is a result, not a failure)
    """Error of a runtime that cannot run a network here; the message is the reason."""


def eager(network: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a call that runs ``network`` on ``images``; the caller disables gradients."""
    return lambda: network(images)


def compiled(network: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a call that runs the compiled ``network`` on ``images``; raises NotMeasured.

    Code compiled earlier for other shapes is kept; ``forget_compiled`` removes it.
    """
    compiled_network: Any = torch.compile(network, dynamic=False)
    try:
        compiled_network(images)
    except Exception as error:  # the compiler may raise anything, e.g. without a C++ compiler
        raise NotMeasured(f"torch.compile: {reason(error)}") from error
    return lambda: compiled_network(images)


def forget_compiled(networks: int) -> None:
    """Remove compiled code, and raise torch's limit to ``networks`` of one class.

    Beyond its limit torch.compile runs a network uncompiled, without an error.
    """
    dynamo: Any = torch._dynamo
    dynamo.reset()
    for name in (
        "recompile_limit",
        "cache_size_limit",
    ):  # in torch 2.7 and later, in earlier versions
        if hasattr(dynamo.config, name):
            setattr(dynamo.config, name, max(networks + 1, getattr(dynamo.config, name)))


def onnx_session(content: bytes, device: torch.device, threads: int) -> OnnxSession:
    """Open an ONNX model in onnxruntime, with ``threads`` threads; raises NotMeasured.

    Its threads do not spin while they wait, because other networks are timed in turn.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise NotMeasured("onnxruntime is not installed: pip install 'gammaslim[onnx]'")
    import onnxruntime

    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise NotMeasured(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session: OnnxSession = onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:  # onnxruntime has its own exceptions
        raise NotMeasured(f"onnxruntime: {reason(error)}") from error
    return session


def onnx_call(session: OnnxSession, images: torch.Tensor) -> Callable[[], object]:
    """Return a call that runs ``session`` on ``images`` (B, C, H, W); raises NotMeasured."""
    inputs = {session.get_inputs()[0].name: images.float().contiguous().cpu().numpy()}
    try:
        session.run(None, inputs)
    except Exception as error:
        raise NotMeasured(f"onnxruntime: {reason(error)}") from error
    return lambda: session.run(None, inputs)
