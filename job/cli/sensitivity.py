"""``sensitivity``: what the outputs of MODEL lose when each channel group alone is reduced."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from job.cli.calibration_images import calibration_data, open_images
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
from job.slimming.planning.allocation import Allocation
from job.slimming.planning.cost import example_image
from job.slimming.planning.policies import policy_for
from job.slimming.planning.target import Budget

if TYPE_CHECKING:
    from accelerate import Accelerator

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions, SensitivityOptions
    from job.files import JsonObject
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
    budget = Budget.parse(options.target) if options.target else None
    PreprocessingOptions.of(model).check()
    file = None if csv in (None, _STDOUT) else Path(csv)
    if file is not None:
        check_output(file)
    accelerator = start(options.device, options.precision)
    card, measured = _measure(model, options, budget, accelerator)
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
    budget: Budget | None,
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
    image, allocation, base = example_image(card.preprocessing.input_size), None, None
    if budget:
        base = card.base or base_of(network, card)
        bounds = options.round_to, options.min_keep
        allocation = Allocation(policy_for(budget), budget, *bounds)
    graph, show = analyse(network, image), partial(show_step, "sensitivity")
    batches = calibration.batches
    loss = output_loss_of(card.task)
    parts = network, graph, batches, image, allocation, base
    measured = measure_sensitivity(*parts, output_loss=loss, progress=show)
    phase("")
    return card, measured


def _record(card: ModelCard, measured: Sensitivity) -> JsonObject:
    facts = {"model": card.model, "width": card.width, "image_size": card.preprocessing.size}
    return {**facts, **measured.to_dict()}
