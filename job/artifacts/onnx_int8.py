"""Static post-training quantisation of ONNX models to 8 bits, by onnxruntime.

Activations are unsigned and weights signed 8-bit numbers, with a scale for each output channel of a
layer, between pairs of QuantizeLinear and DequantizeLinear. Weights use 7 of their bits, so that
sums do not saturate on processors without 8-bit dot products: results do not depend on the
processor (Jacob et al. 2018; onnxruntime's manual of quantisation).
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from job.artifacts.export import INPUT_NAME
from job.artifacts.export_onnx import open_onnx
from job.errors import GammaslimError, UsageError, reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import numpy as np


class OnnxNetwork(torch.nn.Module):
    """An ONNX model as a network: images (B, 3, H, W) to logits (B, N), on the CPU."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._run = open_onnx(content)
        # evaluation looks for the device of a network at its parameters
        self.place = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of ``images``."""
        outputs = self._run(images.cpu())
        assert isinstance(outputs, torch.Tensor)  # of a classifier
        return outputs.to(images.device)


class _Batches:
    """Calibration batches, as onnxruntime reads them."""

    def __init__(self, batches: Iterable[torch.Tensor]) -> None:
        self._rest: Iterator[torch.Tensor] = iter(batches)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """Return the inputs of the next batch; None after the last one."""
        images = next(self._rest, None)
        return None if images is None else {INPUT_NAME: images.cpu().numpy()}


def quantise(content: bytes, batches: Iterable[torch.Tensor]) -> bytes:
    """Return the ONNX model ``content`` with 8-bit weights and activations.

    The ranges of the activations are those on ``batches`` of images (B, 3, H, W) float32. Raises
    UsageError if onnxruntime cannot quantise the model.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises what is done here already
    try:
        with tempfile.TemporaryDirectory() as folder:
            names = ("plain", "prepared", "int8")
            plain, prepared, quantised = (Path(folder, f"{name}.onnx") for name in names)
            plain.write_bytes(content)
            # shapes that follow from the graph, and BatchNorm folded into convolutions
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                quantised,
                _Batches(batches),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
            )
            model = onnx.load(quantised)
    except GammaslimError:  # of the images
        raise
    except Exception as error:  # onnx and onnxruntime raise errors of their own
        raise UsageError(f"--int8 cannot quantise this network: {reason(error)}") from error
    finally:
        logging.disable(level)
    # the optimiser drops what the file says about its network
    del model.metadata_props[:]
    model.metadata_props.extend(onnx.load_from_string(content).metadata_props)
    result: bytes = model.SerializeToString()
    return result
