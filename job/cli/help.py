"""``--help`` in named sections: the most used options first, examples before them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

Rows = list[tuple[str, str]]

# the one place to add a new option to; an option of no section is shown in the last one
SECTIONS = {
    "Data": "data split format on-bad-image",
    "Preprocessing": "transform image-size mean std resize crop interpolation",
    "Model": "model model-arg weights num-classes",
    "Training": "base-epochs epochs batch-size optimizer lr weight-decay schedule batchnorm",
    "Slimming": (
        "rounds rate target policy importance compensate recalibrate round-to min-keep max-drop"
    ),
    "Sparsity and distillation": (
        "sparsity sparsity-weight sparsity-epochs distill-alpha distill-temperature teacher"
    ),
    "Running": (
        "output resume checkpoint-every seed device precision workers dry-run json config debug"
        " help"
    ),
    "Tracking": "wandb wandb-project",
}
LAST = "Other options"

# a command that is not here has few options: they are shown in one list
FIRST = {
    "prune": "data model weights output base-epochs rounds rate target epochs dry-run",
    "evaluate": "data split json",
    "predict": "data split output",
    "slim": "output data target policy",
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
        ("gammaslim slim w.pt --model resnet18 --output half --data D", "calibrated by images"),
    ),
    "export": (("gammaslim export RUN --format onnx --output model.onnx", ""),),
    "report": (("gammaslim report RUN", ""), ("gammaslim report RUN RUN", "compare two")),
    "inspect": (("gammaslim inspect RUN", ""),),
    "launch": (("gammaslim launch --nproc 2 -- prune --data D", "two processes here"),),
}


def write_examples(command: click.Command, formatter: click.HelpFormatter) -> None:
    """Command lines to copy, each on a line that is never wrapped."""
    if examples := EXAMPLES.get(str(command.name)):
        width = max((len(line) for line, comment in examples if comment), default=0)
        with formatter.section("Examples"):
            for line, comment in examples:
                note = f"  # {comment}" if comment else ""
                formatter.write(f"  {line:<{width}}{note}".rstrip() + "\n")


def write_options(
    command: click.Command, ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    """The options of ``command``: in sections where there are many, else in one list."""
    options = [p for p in command.get_params(ctx) if isinstance(p, click.Option)]
    for title, members in sections(str(command.name), options).items():
        with formatter.section(title):
            formatter.write_dl(_rows(ctx, members))


def sections(command: str, options: Sequence[click.Parameter]) -> dict[str, list[click.Parameter]]:
    """Options by the title of their section, in the order in which they are shown."""
    if command not in FIRST:
        return {"Options": list(options)}
    titles = {"Most used options": FIRST[command], **SECTIONS}
    left = {max(p.opts, key=len).lstrip("-"): p for p in options}
    found = {}
    for title, names in titles.items():
        if members := [left.pop(name) for name in names.split() if name in left]:
            found[title] = members
    return found | ({LAST: list(left.values())} if left else {})


def _rows(ctx: click.Context, options: Sequence[click.Parameter]) -> Rows:
    records = (option.get_help_record(ctx) for option in options)
    return [(_shorter(record[0]), record[1]) for record in records if record]


def _shorter(usage: str) -> str:
    return (
        usage.replace("INTEGER RANGE", "N")
        .replace("FLOAT RANGE", "X")
        .replace("TEXT", "NAME")
        .replace("|AUTO", "|auto")
    )
