"""``slim``: cut MODEL once, without training, with or without calibration images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job.artifacts.model_card import save_model
from job.cli.calibration_images import SlimImages, open_images
from job.cli.evaluation_images import loader_workers
from job.cli.model import open_model
from job.config import PruneConfig
from job.console import phase, progress, say, say_cautions, show_step
from job.data.preprocessing_options import PreprocessingOptions
from job.distributed.collectives import start
from job.errors import OutputError, UsageError, shown
from job.files import check_writable
from job.pipeline.cautions import model_caution
from job.pipeline.slim_round import base_of
from job.slimming.analysis import analyse
from job.slimming.compensation.recalibration import recalibrate_batchnorms
from job.slimming.cut import (
    choose_method,
    make_cut,
    measure_importance,
    measure_losses,
    options_needing_images,
    plan_cut,
)
from job.slimming.planning.allocation import Allocation
from job.slimming.planning.cost import example_image
from job.slimming.planning.overview import costs_table
from job.slimming.planning.plan import keep_of
from job.slimming.planning.target import Budget
from job.slimming.recovery.recovery import recover
from job.training.calibration import Calibration
from job.training.evaluation import Evaluator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions, SlimOptions


def slim_model(model: ModelOptions, output: str, options: SlimOptions) -> None:
    """Cut MODEL, verify the cut in float64, save it, and print its costs and accuracy."""
    _check_images_given(options)
    PreprocessingOptions.of(model).check()
    folder = _new_folder(output)
    images, accelerator = None, None
    if options.data:
        accelerator = start(options.device, options.precision)
        images = open_images(options.data, options.on_bad_image, model, options.seed)
    network, card = open_model(model, images.largest if images else 0)
    tools = None
    if images and accelerator:
        network.to(accelerator.device)
        tools = _Tools(images, card, accelerator, options)
    allocation = _allocation(options)
    method, line = choose_method(
        options.importance,
        options.compensate,
        options.allocate,
        images=bool(images),
        policy=allocation.policy,
        seed=options.seed,
    )
    if line:
        say(line)
    before = tools.accuracy(network) if tools else None
    if images and images.scoring is not None and before is not None:
        counts = np.bincount(images.scoring.labels).tolist()
        say_cautions([model_caution(before, counts, weights=Path(model.path).is_file())])
    image = example_image(card.preprocessing.size)
    graph, base = analyse(network, image), card.base or base_of(network, card)
    show = partial(show_step, "slimming")
    scores, data = measure_importance(
        network, graph, method, tools.calibration.batches if tools else None, show
    )
    curves = measure_losses(network, graph, scores, method, data, image, show)
    plan = plan_cut(network, graph, scores, allocation, method, base, curves)
    narrow, plan = make_cut(plan, network, graph, image, method.compensate, data, show)
    phase("")
    if tools and options.recalibrate:
        count = options.recalibrate * PruneConfig.batch_size
        recalibrate_batchnorms(narrow, tools.calibration.batches(count))
    after = cut_only = tools.accuracy(narrow) if tools else None
    if tools and options.recover:
        keep = keep_of(graph, plan.groups)
        batches = tools.calibration.batches
        recover(network, narrow, graph, keep, batches, options.recover, options.seed, show)
        phase("")
        after = tools.accuracy(narrow)
    lineage = replace(card.lineage, slimmed_from=shown(Path(model.path).absolute()))
    slimmed = card.cut(plan.layers, plan.width)
    metrics = {} if after is None or not images else {images.scored: after}
    save_model(folder, narrow.cpu(), replace(slimmed, metrics=metrics, lineage=lineage, base=base))
    assert plan.before
    assert plan.after
    assert plan.proof
    say(costs_table(plan.before, plan.after))
    exact = f"relative error {plan.proof.error:.1e}"
    say(f"the cut is verified in float64: {exact}; saved in {shown(output)}")
    if options.recover and cut_only is not None and after is not None:
        say(f"recovery: accuracy {cut_only:.4f} before, {after:.4f} after")
    say(_accuracies(images, before, after))


def _check_images_given(options: SlimOptions) -> None:
    """Raise UsageError for options that need images when there are none."""
    words = options_needing_images(options.importance, options.compensate, options.allocate)
    words += ["--recalibrate"] if options.recalibrate else []
    words += ["--recover"] if options.recover else []
    if words and not options.data:
        verb = "needs" if len(words) == 1 else "need"
        raise UsageError(f"{' and '.join(words)} {verb} images: add --data PATH")


def _allocation(options: SlimOptions) -> Allocation:
    """Return the target, with the policy that fits it by default."""
    budget = Budget.parse(options.target)
    policy = options.policy or ("uniform" if budget.metric == "width" else "global")
    return Allocation(policy, budget, options.round_to, options.min_keep)


def _new_folder(output: str) -> Path:
    """Return the folder to write; raise OutputError if it exists and is not empty."""
    folder = Path(output)
    if folder.absolute() == Path.cwd():  # it would be replaced by another folder
        raise OutputError(f"--output {shown(output)!r} is the current folder: choose a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"--output {shown(output)} exists already: choose another")
    check_writable(folder)
    return folder


class _Tools:
    """Calibration and scoring of networks with the images."""

    def __init__(
        self, images: SlimImages, card: ModelCard, accelerator: Accelerator, options: SlimOptions
    ) -> None:
        workers = loader_workers(options, accelerator.device)
        images.fit(card)
        self.calibration = Calibration(
            images.calibration, card.preprocessing, accelerator, workers, options.seed
        )
        self.evaluator = None
        if images.scoring is not None:
            self.evaluator = Evaluator(
                images.scoring, card.num_classes, card.preprocessing, accelerator, workers
            )

    def accuracy(self, network: nn.Module) -> float | None:
        """Measure the accuracy on the scoring split; None if there is none."""
        if self.evaluator is None:
            return None
        count, bar = len(self.evaluator.batches), progress("evaluating")
        return self.evaluator(network, lambda batches: bar(batches, count)).accuracy


def _accuracies(images: SlimImages | None, before: float | None, after: float | None) -> str:
    if images is None:
        return (
            "accuracy was not measured: --data PATH calibrates the cut with images and measures it"
        )
    if before is None or after is None:
        return f"accuracy was not measured: {images.unscored}"
    return (
        f"accuracy on {images.describe()}: {before:.4f} before, {after:.4f} after "
        f"({100 * (after - before):+.2f} points)"
    )
