"""Make something of a model without data: ``slim`` and ``export``."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes

from job.artifact import save_model
from job.commands.model import ModelOptions, check_output, open_model, write_output
from job.console import say, table
from job.errors import OutputError, shown
from job.run import check_writable
from job.slimming.cost import network_cost
from job.slimming.plan import uniform_plan
from job.slimming.surgery import narrowed
from job.slimming.verification import verify


def slim(model: ModelOptions, output: str, width: float) -> None:
    """Cut MODEL to ``width`` without training and save it, after the proof in float64."""
    network, card = open_model(model)
    folder = Path(output)
    if folder.absolute() == Path.cwd():  # complete or not at all: it is put there as a whole
        raise OutputError(f"--output {shown(output)!r} is the current folder; choose a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"--output {shown(output)} exists already; choose another")
    check_writable(folder)
    size = card.preprocessing.size
    plan = uniform_plan(network, width)
    narrow = narrowed(network, plan.layers)
    error = verify(network, narrow, plan, size)
    before, after = network_cost(network, size), network_cost(narrow, size)
    lineage = card.lineage | {"slimmed_from": shown(Path(model.path).absolute())}
    slimmed = replace(card.cut(plan.layers, width), metrics={}, lineage=lineage)
    save_model(folder, narrow, slimmed)
    rows = [
        (name, f"{old:,}", f"{new:,}", f"{new / old:.1%}")
        for (name, old), new in zip(before.to_dict().items(), after.to_dict().values(), strict=True)
    ]
    say(table(("", "before", "after", "left"), rows))
    say(f"verified in float64: relative error {error:.1e}; saved in {shown(output)}")


def export(model: ModelOptions, output: str) -> None:
    """Write the network's state dict: .safetensors, or a torch file for any other ending."""
    check_output(Path(output))
    network, card = open_model(model)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    if Path(output).suffix == ".safetensors":
        content = safetensors_bytes(state, {"format": "pt"})
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
    write_output(Path(output), content)
    say(f"{card.model} at width {card.width!r}: {len(state)} tensors in {shown(output)}")
