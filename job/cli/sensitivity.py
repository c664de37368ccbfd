"""``sensitivity``: what the outputs of MODEL lose when each channel group alone is reduced."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from job.cli.calibration_images import calibration_data, open_images
from job.cli.cut_target import single_cut, uncut_network
from job.cli.evaluate_task import card_of_task
from job.cli.open_model import open_model
from job.cli.task_images import open_task_images
from job.config import output_loss_of
from job.console import phase, print_result, say, show_step, tick
from job.data.preprocessing_options import PreprocessingOptions
from job.distributed.collectives import start
from job.errors import UsageError, shown
from job.files import check_output, write_output
from job.pipeline.slim_round import base_of
from job.slimming.analysis import analyse
from job.slimming.group_sensitivity import measure_sensitivity
from job.slimming.planning.cost import example_image

if TYPE_CHECKING:
    from accelerate import Accelerator

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions, SensitivityOptions
    from job.files import JsonObject
    from job.slimming.planning.allocation import Allocation
    from job.slimming.sensitivity.record import Sensitivity

_STDOUT = "-"


def print_sensitivity(
    model: ModelOptions, options: SensitivityOptions, csv: str | None, as_json: bool
) -> None:
    """Measure MODEL, and print a table with a row for each channel group, JSON or CSV.

    With a target, the table shows how many channels ``slim`` keeps of each group. A ``csv`` file is
    written in addition to the printed output; for ``-`` only CSV is printed.
    """
    if as_json and csv == _STDOUT:
        raise UsageError("--json and --csv - both print on standard output: give --csv a file")
    allocation = single_cut(options.target, options) if options.target else None
    PreprocessingOptions.of(model).check()
    file = None if csv in (None, _STDOUT) else Path(csv)
    if file is not None:
        check_output(file)
    accelerator = start(options.device, options.precision)
    card, measured = _measure(model, options, allocation, accelerator)
    rows = measured.to_csv().encode("utf-8", "surrogateescape")
    if file is not None:
        write_output(file, rows)
    if csv == _STDOUT:
        print_result(rows)
    elif as_json:
        print_result(json.dumps(_record(card, measured), indent=1))
    else:
        size = card.preprocessing.size
        print_result(f"{card.model} at width {card.width:.4f}, {size} pixels\n{measured}")
    if file is not None:
        say(f"the table is saved in {shown(file)}")


def _measure(
    model: ModelOptions,
    options: SensitivityOptions,
    allocation: Allocation | None,
    accelerator: Accelerator,
) -> tuple[ModelCard, Sensitivity]:
    if card_of_task(model):
        network, card = open_model(model)
        opened = open_task_images(model, options, card, network, accelerator, tick)
        calibration = opened.calibration
    else:
        data = calibration_data(model, options.data)
        images = open_images(data, options.on_bad_image, model, options.seed)
        network, card = open_model(model, images.largest)
        calibration = images.calibrate(card, accelerator, options, tick)
    network.to(accelerator.device)
    image = example_image(card.preprocessing.input_size)
    base = timed_base = None
    if allocation:
        base, timed_base = card.base or base_of(network, card), uncut_network(network, card)
    graph, loss = analyse(network, image), output_loss_of(card.task)
    measured = measure_sensitivity(
        network,
        graph,
        calibration.batches,
        image,
        allocation,
        base,
        timed_base,
        output_loss=loss,
        progress=partial(show_step, "sensitivity"),
    )
    phase("")
    return card, measured


def _record(card: ModelCard, measured: Sensitivity) -> JsonObject:
    facts = {"model": card.model, "width": card.width, "image_size": card.preprocessing.size}
    return {**facts, **measured.to_dict()}
