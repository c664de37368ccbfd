"""``export --int8``: quantise an ONNX model on calibration images, and compare accuracies."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from job.artifacts.accuracy import accuracy_change, signed_points
from job.artifacts.export_card import Quantisation
from job.artifacts.export_onnx import onnx_bytes
from job.artifacts.onnx_int8 import OnnxNetwork, quantise
from job.cli.calibration_images import calibration_data, open_images
from job.cli.evaluate_task import refuse_task
from job.cli.open_model import open_model
from job.console import amount, counted, progress, tick
from job.data.preprocessing_options import PreprocessingOptions
from job.distributed.collectives import start
from job.errors import UsageError
from job.training.evaluation import Evaluator

if TYPE_CHECKING:
    from accelerate import Accelerator

    from job.artifacts.model_card import ModelCard
    from job.cli.calibration_images import SlimImages
    from job.cli.command_options import ModelOptions, QuantisationOptions
    from job.files import JsonObject


def check_int8(format: str, options: QuantisationOptions) -> None:
    """Raise UsageError if the options contradict each other, or without onnxruntime."""
    if not options.int8:
        for name in ("data", "calibration_images"):
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} has no effect without --int8: leave it out")
        return
    if format != "onnx":
        raise UsageError(f"--int8 needs --format onnx, not {format}: name the file e.g. model.onnx")
    if find_spec("onnxruntime") is None:
        raise UsageError("--int8 needs the package onnxruntime: pip install 'gammaslim[onnx]'")


def int8_bytes(
    model: ModelOptions, options: QuantisationOptions
) -> tuple[ModelCard, bytes, Quantisation, str]:
    """Return the card of MODEL, its quantised ONNX model, both accuracies, and a sentence on them.

    Raises UsageError for a network of another task, and InputNotFound or DataError for the images.
    """
    refuse_task(model, "export --int8", "leave out --int8")
    PreprocessingOptions.of(model).check()
    accelerator = start("cpu", "fp32")
    data = calibration_data(model, options.data)
    images = open_images(data, options.on_bad_image, model, options.seed)
    network, card = open_model(model, images.largest)
    plain, _ = onnx_bytes(network, card)
    calibration = images.calibrate(card, accelerator, options, tick)
    quantised = quantise(plain, (inputs for inputs, _ in calibration.batches()))
    used = min(calibration.most, len(images.calibration))
    sizes = f"{amount(len(plain))} before, {amount(len(quantised))} after"
    scores = _scores(images, card, accelerator, plain, quantised)
    how = f"int8, calibrated on {counted(used, 'image')}"
    other: JsonObject | None = None
    if options.data:
        other = {"root": images.data.root, "layout": images.data.layout}
    int8 = Quantisation(how, (len(plain), len(quantised)), scores, images.scored, other)
    return card, quantised, int8, f"{how}; {sizes}; {_compared(images, scores)}"


def _scores(
    images: SlimImages, card: ModelCard, accelerator: Accelerator, plain: bytes, quantised: bytes
) -> tuple[float, float] | None:
    """Return the accuracies before and after; None without labels."""
    if images.scoring is None:
        return None
    evaluator = Evaluator(images.scoring, card.num_classes, card.preprocessing, accelerator, 0)
    bar, count = progress("evaluating"), len(evaluator.batches)
    before, after = (
        evaluator(OnnxNetwork(content), lambda batches: bar(batches, count)).accuracy
        for content in (plain, quantised)
    )
    return before, after


def _compared(images: SlimImages, scores: tuple[float, float] | None) -> str:
    """Return the accuracies before and after in words, or why there are none."""
    if scores is None:
        return f"accuracy not measured: {images.unscored}"
    before, after = scores
    change = signed_points(accuracy_change(after, before))
    return f"accuracy {before:.4f} before, {after:.4f} after ({change} points) on " + (
        images.describe()
    )
