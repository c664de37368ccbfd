"""``slim``: cut MODEL once, without training, with or without calibration images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job.artifacts.model_card import save_model
from job.cli.calibration_images import SlimImages, open_images
from job.cli.cut_target import single_cut, uncut_network
from job.cli.evaluate_task import card_of_task
from job.cli.evaluation_images import loader_workers
from job.cli.open_model import open_model
from job.cli.task_images import TaskImages, open_task_images
from job.config import PruneConfig, allocation_caution, output_loss_of
from job.console import phase, progress, say, say_cautions, show_step
from job.data.preprocessing_options import PreprocessingOptions
from job.distributed.collectives import start
from job.errors import OutputError, UsageError, shown
from job.files import check_writable
from job.pipeline.cautions import model_caution
from job.pipeline.slim_round import base_of
from job.slimming.analysis import analyse
from job.slimming.compensation.recalibration import recalibrate_batchnorms
from job.slimming.cut import cut_network
from job.slimming.method import choose_method, options_needing_images
from job.slimming.planning.cost import example_image
from job.slimming.planning.overview import costs_table, removed_lines
from job.slimming.planning.plan import keep_of
from job.slimming.recovery.recovery import recover
from job.tasks.loading import brings_items
from job.training.evaluation import Evaluator

if TYPE_CHECKING:
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions, SlimOptions
    from job.slimming.method import Method
    from job.slimming.planning.plan import Plan
    from job.training.calibration import Calibration
    from job.training.task_evaluation import TaskEvaluator


SHOW = partial(show_step, "slimming")


def slim_model(model: ModelOptions, output: str, options: SlimOptions) -> None:
    """Cut MODEL, verify the cut in float64, save it, and print its costs and accuracy."""
    task = card_of_task(model)
    has_images = bool(options.data) or (task is not None and brings_items(task.task))
    if not has_images:
        _check_no_images_needed(options)
    if options.importance == "taylor" and task:
        raise UsageError("--importance taylor needs labels of classes: take refit or gamma")
    PreprocessingOptions.of(model).check()
    folder = _new_folder(output)
    wide, card, tools = _open(model, options, task, has_images)
    allocation = single_cut(options.target, options, options.policy)
    method = _method(options, allocation.policy, tools, card.task)
    accuracies = [tools.accuracy(wide)]
    _say_caution(model, tools, accuracies[0])
    image = example_image(card.preprocessing.input_size)
    graph, base = analyse(wide, image), card.base or base_of(wide, card)
    batches = tools.calibration.batches if tools.calibration else None
    narrow, plan = cut_network(
        wide, graph, image, allocation, method, batches, base, SHOW, uncut_network(wide, card)
    )
    phase("")
    if options.recalibrate and batches:
        recalibrate_batchnorms(narrow, batches(options.recalibrate * PruneConfig.batch_size))
    accuracies.append(tools.accuracy(narrow))
    if options.recover and batches:
        keep = keep_of(graph, plan.groups)
        recover(wide, narrow, graph, keep, batches, options.recover, options.seed, SHOW)
        phase("")
        accuracies.append(tools.accuracy(narrow))
    lineage = replace(card.lineage, slimmed_from=shown(Path(model.path).absolute()))
    slimmed = replace(card.cut(plan.layers, plan.width), lineage=lineage, base=base)
    save_model(folder, narrow.cpu(), replace(slimmed, metrics=tools.metrics(accuracies[-1])))
    target = f"{allocation.budget}{', of the network before its first cut,' if card.layers else ''}"
    _say_result(plan, target, output, tools.images, accuracies)


def _check_no_images_needed(options: SlimOptions) -> None:
    """Raise UsageError for options that need images."""
    words = options_needing_images(options.importance, options.compensate, options.allocate)
    words += ["--recalibrate"] if options.recalibrate else []
    words += ["--recover"] if options.recover else []
    if words:
        verb = "needs" if len(words) == 1 else "need"
        raise UsageError(f"{' and '.join(words)} {verb} images: add --data PATH")


def _new_folder(output: str) -> Path:
    """Return the folder to write; raise OutputError if it exists and is not empty."""
    folder = Path(output)
    if folder.absolute() == Path.cwd():  # it would be replaced by another folder
        raise OutputError(f"--output {shown(output)!r} is the current folder: choose a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"--output {shown(output)} exists already: choose another")
    check_writable(folder)
    return folder


@dataclass(frozen=True)
class _Tools:
    """Calibration and scoring of networks; without ``images`` there is neither."""

    images: SlimImages | TaskImages | None = None
    calibration: Calibration | None = None
    evaluator: Evaluator | TaskEvaluator | None = None

    def accuracy(self, network: nn.Module) -> float | None:
        """Measure the accuracy on the scoring split; None if there is none."""
        if self.evaluator is None:
            return None
        count, bar = len(self.evaluator.batches), progress("evaluating")
        return self.evaluator(network, lambda batches: bar(batches, count)).accuracy

    def metrics(self, accuracy: float | None) -> dict[str, float]:
        """Return the metrics of a model card: an accuracy by the name of the scoring split."""
        if accuracy is None or not self.images:
            return {}
        if isinstance(self.images, TaskImages):
            return {f"valid_{self.images.metric}": accuracy}
        return {self.images.scored: accuracy}


def _open(
    model: ModelOptions, options: SlimOptions, task: ModelCard | None, has_images: bool
) -> tuple[nn.Module, ModelCard, _Tools]:
    """Open MODEL and its card, and the images of --data or the items of its ``task``, if any."""
    if not has_images:
        return *open_model(model), _Tools()
    accelerator = start(options.device, options.precision)
    if task:
        network, card = open_model(model)
        items = open_task_images(model, options, card, network, accelerator)
        network.to(accelerator.device)
        return network, card, _Tools(items, items.calibration, items.evaluator)
    assert options.data
    images = open_images(options.data, options.on_bad_image, model, options.seed)
    network, card = open_model(model, images.largest)
    network.to(accelerator.device)
    calibration = images.calibrate(card, accelerator, options)
    if images.scoring is None:
        return network, card, _Tools(images, calibration)
    workers = loader_workers(options, accelerator.device)
    evaluator = Evaluator(
        images.scoring, card.num_classes, card.preprocessing, accelerator, workers
    )
    return network, card, _Tools(images, calibration, evaluator)


def _method(options: SlimOptions, policy: str, tools: _Tools, task: str) -> Method:
    """Choose the method, and print what was chosen by default."""
    method, line = choose_method(
        options.importance,
        options.compensate,
        options.allocate,
        images=tools.images is not None,
        depth=options.depth,
        policy=policy,
        seed=options.seed,
    )
    if line:
        say(line)
    say_cautions([allocation_caution(options.allocate, policy)])
    return replace(method, output_loss=output_loss_of(task))


def _say_caution(model: ModelOptions, tools: _Tools, accuracy: float | None) -> None:
    """Print a caution if the accuracy before the cut is near chance."""
    images = tools.images
    if accuracy is not None and isinstance(images, SlimImages) and images.scoring is not None:
        counts = np.bincount(images.scoring.labels).tolist()
        say_cautions([model_caution(accuracy, counts, weights=Path(model.path).is_file())])


def _say_result(
    plan: Plan,
    target: str,
    output: str,
    images: SlimImages | TaskImages | None,
    accuracies: list[float | None],
) -> None:
    """Print costs, proof and accuracies: before the cut, after it, and after any recovery."""
    assert plan.before
    assert plan.after
    assert plan.proof
    say("\n".join([costs_table(plan.before, plan.after), *removed_lines(plan.layers)]))
    if plan.after == plan.before:
        say_cautions([f"nothing was cut: the network meets {target} already"])
    if plan.latency:
        say(str(plan.latency))
    proof = f"{plan.proof.precision}: relative error {plan.proof.error:.1e}"
    say(f"the cut is verified in {proof}; saved in {shown(output)}")
    before, cut, after = accuracies[0], accuracies[1], accuracies[-1]
    if len(accuracies) > 2 and cut is not None and after is not None:
        say(f"recovery: {_metric(images)} {cut:.4f} before, {after:.4f} after")
    say(_accuracy_line(images, before, after))


def _metric(images: SlimImages | TaskImages | None) -> str:
    return images.metric if isinstance(images, TaskImages) else "accuracy"


def _accuracy_line(
    images: SlimImages | TaskImages | None, before: float | None, after: float | None
) -> str:
    if images is None:
        return (
            "accuracy was not measured: --data PATH calibrates the cut with images and measures it"
        )
    if before is None or after is None:
        assert isinstance(images, SlimImages)
        return f"accuracy was not measured: {images.unscored}"
    return (
        f"{_metric(images)} on {images.describe()}: {before:.4f} before, {after:.4f} after "
        f"({100 * (after - before):+.2f} points)"
    )
