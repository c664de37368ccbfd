"""``--help``: examples, the most used options, then the other options in sections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from job.config import SECTIONS
from job.options import options_of

if TYPE_CHECKING:
    from collections.abc import Sequence

LAST = "Running"
# the most used options by command; the options of other commands are shown in one list
FIRST = {
    "prune": "data model weights output base-epochs rounds rate target epochs dry-run",
    "evaluate": "data split json",
    "predict": "data split output format",
    "inspect": "model json",
    "sensitivity": "data target csv json",
    "slim": "output data target policy",
    "bench": "batch-sizes threads precision memory-format compile json",
    "export": "output format model",
}
EXAMPLES = {
    "prune": (
        ("gammaslim prune", "StudentNet, Fashion-MNIST"),
        ("gammaslim prune --data D --dry-run", "check, train nothing"),
        ("gammaslim prune --data D --model resnet18 --weights resnet18.pt", ""),
        ("gammaslim prune --data D --rounds 3 --target macs=0.5", "half of the MACs"),
        ("gammaslim launch --nproc 2 -- prune --data D", "two processes"),
    ),
    "evaluate": (
        ("gammaslim evaluate RUN", "validation split"),
        ("gammaslim evaluate RUN --data D --split testing", ""),
        ("gammaslim evaluate w.pt --model resnet18 --data D", "a weights file"),
    ),
    "predict": (("gammaslim predict RUN --data D --output classes.csv", ""),),
    "slim": (
        ("gammaslim slim RUN --output half --target macs=0.5", "half of the MACs"),
        ("gammaslim slim w.pt --model resnet18 --output half --data D", "calibrated with images"),
    ),
    "prepare": (
        ("gammaslim prepare --data D", "into SLURM_TMPDIR or TMPDIR"),
        ("gammaslim prepare --data D --cache-dir /scratch/cache", ""),
        ("gammaslim launch --nproc 4 -- prepare --data D", "four processes"),
    ),
    "sensitivity": (
        ("gammaslim sensitivity RUN", "images of the run"),
        ("gammaslim sensitivity w.pt --model resnet18 --data D --target macs=0.5", ""),
        ("gammaslim sensitivity RUN --data D --csv groups.csv", ""),
    ),
    "bench": (
        ("gammaslim bench RUN", "its base and its recommended model"),
        ("gammaslim bench RUN/rounds/01 RUN/rounds/02 --batch-sizes 1,64", ""),
        ("gammaslim bench wide.onnx slim.onnx --threads 1", "in onnxruntime"),
    ),
    "export": (("gammaslim export RUN --format onnx --output model.onnx", ""),),
    "report": (
        ("gammaslim report RUN", ""),
        ("gammaslim report RUN RUN", "compare two"),
        ("gammaslim report runs --csv runs.csv", "all under a folder"),
    ),
    "status": (
        ("gammaslim status RUN", ""),
        ("gammaslim status runs --watch", "all runs under a folder"),
    ),
    "inspect": (("gammaslim inspect RUN", ""),),
    "launch": (("gammaslim launch --nproc 2 -- prune --data D", "two processes here"),),
}


def write_examples(command: click.Command, formatter: click.HelpFormatter) -> None:
    """Write the examples of ``command``; a command line is never wrapped."""
    if examples := EXAMPLES.get(str(command.name)):
        width = max((len(line) for line, comment in examples if comment), default=0)
        with formatter.section("Examples"):
            for line, comment in examples:
                note = f"  # {comment}" if comment else ""
                formatter.write(f"  {line:<{width}}{note}".rstrip() + "\n")


def write_options(
    command: click.Command, ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    """Write the options of ``command``, in sections if it is listed in FIRST."""
    options = [p for p in command.get_params(ctx) if isinstance(p, click.Option)]
    for title, members in sections(str(command.name), options).items():
        with formatter.section(title):
            records = (option.get_help_record(ctx) for option in members)
            formatter.write_dl([record for record in records if record])


def sections(command: str, options: Sequence[click.Option]) -> dict[str, list[click.Option]]:
    """Group options by the title of their section, in the order in which they are shown.

    The sections are those of the configuration. Options outside it are placed in LAST.
    """
    if command not in FIRST:
        return {"Options": list(options)}
    left = {max(p.opts, key=len).lstrip("-"): p for p in options}
    titles = {"Most used options": FIRST[command].split()}
    titles |= {
        title: [name.replace("_", "-") for name in options_of(record)]
        for title, record in SECTIONS.items()
    }
    shown = {
        title: [left.pop(name) for name in names if name in left] for title, names in titles.items()
    }
    shown[LAST] += left.values()
    return {title: members for title, members in shown.items() if members}
