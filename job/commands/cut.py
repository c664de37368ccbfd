"""Make something of a model without data: ``slim`` and ``export``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifact import save_model
from job.commands.model import ModelOptions, open_model
from job.console import say, table
from job.cut import base_of
from job.errors import OutputError, shown
from job.exporting import onnx_bytes, state_dict_bytes, torch_export_bytes
from job.files import check_output, check_writable, write_output
from job.slimming.budget import Budget
from job.slimming.cost import picture
from job.slimming.cut import Method, make_cut, plan_cut
from job.slimming.engine import Slimming, analyse

if TYPE_CHECKING:
    from torch import nn

    from job.artifact import ModelCard


def slim(
    model: ModelOptions,
    output: str,
    *,
    policy: str | None,
    target: str,
    round_to: int,
    min_keep: float,
    importance: str,
    seed: int,
) -> None:
    """Cut MODEL to ``target`` without training and save it, after the proof in float64."""
    network, card = open_model(model)
    folder = Path(output)
    if folder.absolute() == Path.cwd():  # complete or not at all: it is put there as a whole
        raise OutputError(f"--output {shown(output)!r} is the current folder; choose a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"--output {shown(output)} exists already; choose another")
    check_writable(folder)
    image, budget = picture(card.preprocessing.size), Budget.parse(target)
    policy = policy or ("uniform" if budget.metric == "width" else "global")
    graph = analyse(network, image)
    base = card.base or base_of(network, card)
    slimming = Slimming(policy, budget, round_to, min_keep)
    narrow, plan, error = make_cut(
        network,
        graph,
        image,
        Method(importance, seed=seed),
        lambda scores: plan_cut(network, graph, scores, slimming, "none", image, base),
    )
    lineage = card.lineage | {"slimmed_from": shown(Path(model.path).absolute())}
    slimmed = card.cut(plan.layers, plan.width)
    save_model(folder, narrow, replace(slimmed, metrics={}, lineage=lineage, base=base))
    assert plan.before
    assert plan.after
    rows = [
        (name, f"{old:,}", f"{new:,}", f"{new / old:.1%}" if old else "")
        for (name, old), new in zip(
            plan.before.to_dict().items(), plan.after.to_dict().values(), strict=True
        )
    ]
    say(table(("", "before", "after", "left"), rows))
    say(f"verified in float64: relative error {error:.1e}; saved in {shown(output)}")


def export(model: ModelOptions, output: str, format: str = "state-dict") -> None:
    """Write the network for other programs, checked before the file is put in place."""
    check_output(Path(output))
    network, card = open_model(model)
    content, how = _exported(network, card, format, Path(output).suffix)
    write_output(Path(output), content)
    say(f"{card.model} at width {card.width!r}: {how} in {shown(output)}")


def _exported(network: nn.Module, card: ModelCard, format: str, suffix: str) -> tuple[bytes, str]:
    if format == "onnx":
        return onnx_bytes(network, card)
    if format == "torch-export":
        return torch_export_bytes(network, card)
    return state_dict_bytes(network, suffix), f"{len(network.state_dict())} tensors"
