"""The command line: parse, validate, call. Imports no torch before it is needed."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import click

from job import __version__
from job.cli.click_options import click_options
from job.cli.command import Command, Group
from job.cli.command_options import (
    BenchOptions,
    EvaluateOptions,
    ModelOptions,
    PredictOptions,
    PrepareOptions,
    QuantisationOptions,
    SensitivityOptions,
    SlimOptions,
)
from job.cli.importing import importing
from job.cli.model_argument import data_of, local_model, model_of, model_options
from job.cli.option_types import POSITIVE, ProcessCount, local_path_option
from job.config import PruneConfig
from job.console import counted, lines_on_stderr, log_as_json, warn
from job.distributed.launch import ensure_processes, launch
from job.distributed.topology import find_nodes, nodes_left_out

json_option = click.option("--json", is_flag=True, help="Print JSON.")


@click.group(
    cls=Group,
    context_settings={
        "auto_envvar_prefix": "GAMMASLIM",
        "help_option_names": ["-h", "--help"],
        "show_default": True,
    },
)
# without a variable: container images often set GAMMASLIM_VERSION themselves
@click.version_option(__version__, allow_from_autoenv=False)
def gammaslim() -> None:
    """Make trained CNNs smaller and faster: cut channels, fine-tune, repeat.

    MODEL is a run folder (its recommended model), a round or model folder, or a weights file
    together with --model.
    """


@gammaslim.command("prune", cls=Command)
@click_options(PruneConfig)
def prune_command(**options: Any) -> None:
    """Train or load a network, slim and fine-tune it in rounds."""
    config = PruneConfig(**options)
    log_as_json(config.log == "json")
    with importing():
        ensure_processes()

        import torch._dynamo  # noqa: F401  (the first optimizer imports it)

        from job.pipeline.prune import prune

    prune(replace(config, data=data_of(config.data)))


@gammaslim.command("launch", cls=Command, context_settings={"allow_interspersed_args": False})
@click.option(
    "--nproc",
    metavar="N|auto",
    type=ProcessCount(),
    default="auto",
    help="Number of processes on this machine. auto: one per GPU.",
)
@click.option(
    "--nnodes",
    metavar="N",
    type=POSITIVE,
    help="Number of machines. Run launch once on each. Default: set by the Slurm step, else 1.",
)
@click.option(
    "--node-rank",
    metavar="N",
    type=click.IntRange(0),
    help="Rank of this machine, counted from 0.",
)
@click.option("--master-addr", metavar="HOST", help="Address of the machine of rank 0.")
@click.option(
    "--master-port",
    metavar="N",
    type=click.IntRange(1, 65535),
    help="Free port on the machine of rank 0.",
)
@click.argument("command", metavar="-- COMMAND …", nargs=-1, type=click.UNPROCESSED, required=True)
@click.pass_context
def launch_command(
    ctx: click.Context,
    command: tuple[str, ...],
    nproc: int | None,
    nnodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
) -> None:
    """Run prune, evaluate, predict or prepare in several processes.

    Signals become stop requests. The exit code is that of the processes. Several machines find
    each other through the options, or through the variables NNODES, NODE_RANK, MASTER_ADDR and
    MASTER_PORT. A Slurm step (srun --ntasks-per-node=1) needs none of them; a Kubernetes Indexed
    Job needs only NNODES.
    """
    name, *args = command
    if name not in ("prune", "evaluate", "predict", "prepare"):
        raise click.UsageError(f"launch runs prune, evaluate, predict or prepare, not {name}", ctx)
    assert ctx.parent
    # parse here, so that errors are reported once and not by every process
    started = gammaslim.commands[name].make_context(name, list(args), ctx.parent)
    log_as_json(started.params.get("log") == "json")
    nodes = find_nodes(
        os.environ, count=nnodes, rank=node_rank, address=master_addr, port=master_port
    )
    if unused := nodes_left_out(os.environ):
        warn(
            f"{counted(unused, 'node')} of this allocation will not be used: start launch on each "
            "by srun"
        )
    ctx.exit(launch(command, nproc, nodes))


@gammaslim.command("evaluate", cls=Command)
@model_options
@click_options(EvaluateOptions)
@json_option
def evaluate_command(json: bool, **options: Any) -> None:
    """Measure loss, accuracy and confusion matrix of MODEL."""
    with importing():
        ensure_processes()
        from job.cli.evaluate import evaluate

    model = model_of(options)
    with lines_on_stderr(json):
        evaluate(model, EvaluateOptions(**options), json)


@gammaslim.command("predict", cls=Command)
@model_options
@click_options(PredictOptions)
@local_path_option(
    "--output", metavar="FILE", required=True, help="CSV file to write, or - for standard output."
)
def predict_command(output: str, **options: Any) -> None:
    """Predict the class of each image, in file order."""
    with importing():
        ensure_processes()
        from job.cli.predict import predict

    model = model_of(options)
    with lines_on_stderr(output == "-"):
        predict(model, PredictOptions(**options), output)


@gammaslim.command("inspect", cls=Command)
@model_options
@json_option
def inspect_command(json: bool, **options: Any) -> None:
    """Show channel groups, layer costs, what cannot be cut and why."""
    with importing():
        from job.cli.inspect import inspect

    with lines_on_stderr(json):
        inspect(model_of(options), json)


@gammaslim.command("sensitivity", cls=Command)
@model_options
@click_options(SensitivityOptions)
@local_path_option(
    "--csv", metavar="FILE", help="CSV file to write too, or - for CSV on standard output."
)
@json_option
def sensitivity_command(csv: str | None, json: bool, **options: Any) -> None:
    """Show what the outputs lose when each channel group is reduced.

    Each group alone keeps 90, 75, 50, 25 and 0 % of its channels, the most important ones, and the
    next layers are refitted, as in a cut. Nothing is cut. The loss is the KL divergence of the
    softmax for a classifier, else the squared error relative to the squares of the outputs.
    """
    model = model_of(options)
    with importing():
        from job.cli.sensitivity import print_sensitivity

    with lines_on_stderr(json or csv == "-"):
        print_sensitivity(model, SensitivityOptions(**options), csv, json)


@gammaslim.command("slim", cls=Command)
@model_options
@local_path_option("--output", metavar="DIR", required=True, help="Model folder to write.")
@click_options(SlimOptions)
def slim_command(output: str, **options: Any) -> None:
    """Cut MODEL once, without training, and save the slim model.

    Without images, channels are ranked by γ, and the accuracy is low until the model is
    fine-tuned. With images (--data, labels are not needed), the next layers are refitted to their
    previous outputs, which keeps most of the accuracy.
    """
    model = model_of(options)
    with importing():
        from job.cli.slim import slim_model

    slim_model(model, output, SlimOptions(**options))


@gammaslim.command("prepare", cls=Command)
@click.option("--data", metavar="PATH", required=True, help="Data set, as for prune.")
@click_options(PrepareOptions)
def prepare_command(data: str, **options: Any) -> None:
    """Decode the images of a data set into a cache, ahead of prune.

    All processes of launch share the work. prune finds the cache with the same --data, --cache-dir
    and --cache-max-side.
    """
    with importing():
        ensure_processes()
        from job.cli.prepare import prepare

    prepare(data_of(data), PrepareOptions(**options))


@gammaslim.command("bench", cls=Command)
@click.argument("paths", metavar="MODEL…", nargs=-1, required=True)
@click_options(ModelOptions)
@click_options(BenchOptions)
@json_option
def bench_command(paths: tuple[str, ...], json: bool, **options: Any) -> None:
    """Measure latency and throughput of each MODEL and its base.

    The networks are timed in turn, and each is compared with the first one: the base of the first
    MODEL, or that MODEL itself. MODEL can also be an ONNX file. If a network is not faster, the
    layers responsible are listed.
    """
    paths = tuple(map(local_model, paths))
    model = model_of({"path": paths[0], **options})
    for name in (field.name for field in fields(ModelOptions)):
        options.pop(name, None)
    with importing():
        from job.cli.bench import bench

    with lines_on_stderr(json):
        bench(model, paths, BenchOptions(**options), json)


@gammaslim.command("export", cls=Command)
@model_options
@click.option(
    "--format",
    type=click.Choice(["state-dict", "onnx", "torch-export", "openvino", "coreml"]),
    help="File format. Default: set by the suffix, .onnx, .pt2 (torch-export), .xml (openvino), "
    ".mlpackage (coreml), else state-dict.",
)
@local_path_option("--output", metavar="FILE", required=True, help="File to write.")
@click.option(
    "--card/--no-card",
    default=True,
    help="Whether to write a model card next to the file: metrics, data, inputs, how to load it.",
)
@click_options(QuantisationOptions)
def export_command(format: str | None, output: str, card: bool, **options: Any) -> None:
    """Export MODEL to a file for PyTorch, ONNX, OpenVINO or Core ML.

    The state dict of a StudentNet loads into the homework's StudentNet(width_mult=…). ONNX needs
    the extra gammaslim[onnx], OpenVINO (NAME.xml, NAME.bin) [openvino], Core ML [coreml].
    torch.export.load reads a .pt2 file without the code of the network.
    """
    model = model_of(options)
    with importing():
        from job.cli.export import export

    export(model, output, format, card=card, quantisation=QuantisationOptions(**options))


@gammaslim.command("report", cls=Command)
@click.argument("runs", metavar="RUN…", nargs=-1, required=True)
@local_path_option(
    "--output",
    metavar="FILE.html",
    help="Page to write. Default: RUN/report.html; for several runs, report.html in this folder.",
)
@local_path_option(
    "--csv",
    metavar="FILE",
    help="CSV file to write too, with a line for each model, or - for standard output.",
)
@json_option
def report_command(runs: tuple[str, ...], output: str | None, csv: str | None, json: bool) -> None:
    """Report on one run, or compare several: accuracy against cost.

    Write a self-contained HTML page, and its figures as PNG files in a folder next to it. RUN is a
    run folder, finished or not, or a folder of runs.
    """
    from job.cli.report import report

    report(runs, output, json, csv)


@gammaslim.command("status", cls=Command)
@click.argument("runs", metavar="RUN…", nargs=-1, required=True)
@click.option("--watch", is_flag=True, help="Repeat until no run is running.")
@json_option
def status_command(runs: tuple[str, ...], watch: bool, json: bool) -> None:
    """Show the state and progress of runs, and what to type next.

    RUN is a run folder, or a folder of runs. The command reads only files, so it works from any
    machine that can read the folder.
    """
    from job.cli.status import print_status

    print_status(runs, watch=watch, as_json=json)
