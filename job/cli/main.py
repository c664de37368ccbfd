"""The command line: parse, validate, call. Imports no torch before it is needed."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import click

from job.cli.option_types import POSITIVE, SEED, Finite, ProcessCount, RoundCount
from job.cli.options import (
    DEFAULTS,
    MODELS,
    Command,
    Group,
    cutting,
    data_option,
    json_option,
    model_args,
    model_options,
    num_classes,
    option,
    preprocessing,
    running,
    scoring,
)
from job.config import DEFAULT_BASE_EPOCHS, DEFAULT_SPARSITY, PruneConfig
from job.distributed.launch import ensure_processes
from job.distributed.launch import launch as run_launch
from job.distributed.signals import starting
from job.distributed.topology import find_nodes, nodes_left_out

PREFIX = "GAMMASLIM"


@click.group(
    cls=Group,
    context_settings={"auto_envvar_prefix": PREFIX, "help_option_names": ["-h", "--help"]},
)
# GAMMASLIM_VERSION is a common variable of container images: it is none of ours
@click.version_option(package_name="gammaslim", allow_from_autoenv=False)
def gammaslim() -> None:
    """Make trained CNNs smaller and faster: slim by BatchNorm γ, fine-tune, repeat.

    MODEL is a run folder (its recommended model), a round or model folder, or a weights file
    together with --model.
    """


@gammaslim.command(cls=Command)
@data_option
@option(
    "--output",
    metavar="RUN",
    help="Run folder; default: runs/MODEL-DATA, the next free number for other options.",
)
@option(
    "--resume",
    type=click.Choice(["auto", "never", "require"]),
    default=DEFAULTS.resume,
    help="Resume the run in the folder: if there is one, never, or fail without one.",
)
@option("--model", default=DEFAULTS.model, help=MODELS)
@model_args
@option(
    "--weights",
    metavar="PATH",
    help="State dict: .safetensors, .pt, .pth or .bin; or a slim run, round or model folder.",
)
@num_classes
@preprocessing
@option(
    "--base-epochs",
    type=click.IntRange(0),
    help=f"Epochs of base training; default: {DEFAULT_BASE_EPOCHS}, or 0 with --weights.",
)
@option(
    "--rounds",
    type=RoundCount(),
    default=DEFAULTS.rounds,
    help="Cuts, each followed by fine-tuning; auto: until one loses more than --max-drop.",
)
@option(
    "--rate",
    type=Finite(0, 1, min_open=True),
    default=DEFAULTS.rate,
    help="Width of each round, relative to the one before.",
)
@option("--epochs", type=POSITIVE, default=DEFAULTS.epochs, help="Fine-tune epochs a round.")
@option(
    "--batch-size", type=POSITIVE, default=DEFAULTS.batch_size, help="Global: split over processes."
)
@option(
    "--optimizer",
    type=click.Choice(["adamw", "sgd"]),
    default=DEFAULTS.optimizer,
    help="A new one starts every round; sgd has momentum.",
)
@option(
    "--lr",
    type=Finite(0, min_open=True),
    default=DEFAULTS.lr,
    help="Learning rate at the start of a round.",
)
@option(
    "--weight-decay",
    type=Finite(0),
    default=DEFAULTS.weight_decay,
    help="Not applied to biases and BatchNorm.",
)
@option(
    "--schedule",
    type=click.Choice(["constant", "cosine", "step"]),
    default=DEFAULTS.schedule,
    help="Learning rate within a round.",
)
@cutting(DEFAULTS.policy, None)
@option(
    "--compensate",
    type=click.Choice(["none", "beta", "mean", "regress"]),
    default=DEFAULTS.compensate,
    help="What makes up for the channels that are cut.",
)
@option(
    "--recalibrate",
    metavar="N",
    type=click.IntRange(0),
    default=DEFAULTS.recalibrate,
    help="Batches to measure BatchNorm's statistics on after a cut.",
)
@option(
    "--batchnorm",
    type=click.Choice(["sync", "local"]),
    default=DEFAULTS.batchnorm,
    help="Statistics of the global batch, or of each process's part.",
)
@option(
    "--sparsity",
    type=click.Choice(["none", "l1", "polarize"]),
    default=DEFAULTS.sparsity,
    help="Penalty on γ in the last epochs of the base.",
)
@option(
    "--sparsity-weight",
    metavar="λ",
    type=Finite(0, min_open=True),
    help=f"Weight of that penalty; default: {DEFAULT_SPARSITY:g}.",
)
@option(
    "--sparsity-epochs",
    type=click.IntRange(0),
    default=DEFAULTS.sparsity_epochs,
    help="Epochs with the penalty, after those of base training.",
)
@option(
    "--distill-alpha",
    type=Finite(0, 1),
    default=DEFAULTS.distill_alpha,
    help="Weight of the teacher's outputs; the labels have the rest.",
)
@option(
    "--distill-temperature",
    type=Finite(0, min_open=True),
    default=DEFAULTS.distill_temperature,
    help="Softens the teacher's outputs.",
)
@option("--teacher", metavar="MODEL", help="Run, round or model folder; default: the base.")
@option(
    "--max-drop",
    metavar="POINTS",
    type=Finite(0, 100),
    help="Points of accuracy that a round may lose; the first that loses more is the last.",
)
@running
@option("--seed", type=SEED, default=DEFAULTS.seed, help="Of weights, order and augmentation.")
@option(
    "--wandb",
    type=click.Choice(["auto", "online", "offline", "off"]),
    default=DEFAULTS.wandb,
    help="auto: online when an API key is configured, else offline in the run folder.",
)
@option(
    "--wandb-project", default=DEFAULTS.wandb_project, help="Project that the run is logged to."
)
@option(
    "--checkpoint-every",
    type=Finite(0),
    default=DEFAULTS.checkpoint_every,
    help="Seconds between saved positions within an epoch.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan, train nothing.")
def prune(**options: Any) -> None:
    """Train or load a base network, slim and fine-tune it in rounds."""
    config = PruneConfig(**options)
    with starting():
        ensure_processes()
        from job.pipeline.prune import prune as run

    run(config)


@gammaslim.command(cls=Command, context_settings={"allow_interspersed_args": False})
@option("--nproc", type=ProcessCount(), default="auto", help="Processes here; auto: one a GPU.")
@option("--nnodes", type=POSITIVE, help="Machines, one launch on each; default: srun's, or 1.")
@option("--node-rank", type=click.IntRange(0), help="Number of this machine, from 0.")
@option("--master-addr", metavar="HOST", help="Machine 0, as the others reach it.")
@option("--master-port", type=click.IntRange(1, 65535), help="A free port of machine 0.")
@click.argument("command", metavar="-- COMMAND …", nargs=-1, type=click.UNPROCESSED, required=True)
@click.pass_context
def launch(
    ctx: click.Context,
    command: tuple[str, ...],
    nproc: int | None,
    nnodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
) -> None:
    """Run prune, evaluate or predict in several processes.

    Signals become stop requests, and the processes' exit code is kept. Machines find each other by
    the options or by NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; in a Slurm step (srun
    --ntasks-per-node=1) automatically; in a Kubernetes Indexed Job by NNODES alone.
    """
    name, *args = command
    if name not in ("prune", "evaluate", "predict"):
        raise click.UsageError(f"launch runs prune, evaluate or predict, not {name}", ctx)
    assert ctx.parent
    gammaslim.commands[name].make_context(name, list(args), ctx.parent)  # says what is wrong, once
    nodes = find_nodes(
        os.environ, count=nnodes, rank=node_rank, address=master_addr, port=master_port
    )
    if unused := nodes_left_out(os.environ):
        click.echo(
            f"Warning: {unused} more nodes of this allocation are not used: srun starts a "
            "launch on each",
            err=True,
        )
    ctx.exit(run_launch(command, nproc, nodes))


def _model(options: dict[str, Any]) -> Any:
    from job.cli.model import ModelOptions

    names = [field.name for field in fields(ModelOptions)]
    return ModelOptions(**{name: options.pop(name) for name in names})


@gammaslim.command(cls=Command)
@scoring("validation", "Labelled images, as for prune")
@json_option
def evaluate(json: bool, **options: Any) -> None:
    """Measure loss, accuracy and confusion matrix of MODEL on a split."""
    with starting():
        ensure_processes()
        from job.cli import evaluation_images as chosen
        from job.cli import score

    model = _model(options)
    score.evaluate(model, chosen.DataOptions(**options), json)


@gammaslim.command(cls=Command)
@scoring("testing, or all images where there are no splits", "Data set, folder of images or image")
@option(
    "--format",
    type=click.Choice(["auto", "csv", "kaggle"]),
    default="auto",
    help="csv: file,class,probability; kaggle: Id,Category; auto: kaggle for numbered files of a "
    "split.",
)
@click.option("--output", metavar="FILE", required=True, help="CSV to write.")
def predict(output: str, format: str, **options: Any) -> None:
    """Predict the class of each image, in file order."""
    with starting():
        ensure_processes()
        from job.cli import evaluation_images as chosen
        from job.cli import score

    model = _model(options)
    score.predict(model, chosen.DataOptions(**options), output, format)


@gammaslim.command(cls=Command)
@model_options
@json_option
def inspect(json: bool, **options: Any) -> None:
    """Show channel groups, costs by layer, what cannot be cut and why."""
    with starting():
        from job.cli.inspect import inspect as run

    run(_model(options), json)


@gammaslim.command(cls=Command)
@model_options
@click.option("--output", metavar="DIR", required=True, help="Model folder to write.")
@option(
    "--data",
    metavar="PATH",
    help="Images to calibrate the cut by; with labels they also measure accuracy.",
)
@cutting(None, "channels=0.5", best=True)
@option(
    "--compensate",
    type=click.Choice(["none", "beta", "mean", "regress"]),
    help="What replaces the channels that are cut; default: regress with --data, else none.",
)
@option(
    "--recalibrate",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    help="Batches of 32 images that BatchNorm's statistics are taken from after the cut.",
)
@running
@option(
    "--seed", type=SEED, default=DEFAULTS.seed, help="Of the images' order, --importance random."
)
def slim(output: str, **options: Any) -> None:
    """Cut MODEL once, without training, and save the slim model.

    By γ alone accuracy falls far before fine-tuning. With images (--data, no labels needed) the
    layers after a cut are fitted to what they computed, which keeps most of it.
    """
    model = _model(options)
    with starting():
        from job.cli import slim as command

    command.slim(model, output, command.SlimOptions(**options))


@gammaslim.command(cls=Command)
@model_options
@option(
    "--format",
    type=click.Choice(["state-dict", "onnx", "torch-export"]),
    help="Default: by the suffix, .onnx, .pt2 (torch-export), else a state dict.",
)
@click.option("--output", metavar="FILE", required=True, help="File to write.")
def export(format: str | None, output: str, **options: Any) -> None:
    """Write MODEL as a state dict, ONNX or exported torch program.

    StudentNet's state dict loads into the homework's StudentNet(width_mult=…). ONNX needs the extra
    gammaslim[onnx]; a .pt2 of torch-export is loaded by torch.export.load without any other code.
    """
    with starting():
        from job.cli import export as cut

    cut.export(_model(options), output, format)


@gammaslim.command(cls=Command)
@click.argument("runs", metavar="RUN…", nargs=-1, required=True)
@option(
    "--output",
    metavar="FILE.html",
    help="Page to write; default: RUN/report.html, or report.html here for several runs.",
)
@json_option
def report(runs: tuple[str, ...], output: str | None, json: bool) -> None:
    """Show one run, or compare several: accuracy against cost.

    Writes a page of HTML that holds its figures, and the figures as PNG into a folder next to it.
    RUN is a run folder, finished or not.
    """
    from job.cli.report import report as run

    run(runs, output, json)
