"""Random weights as after some training, and the homework's plan."""

from __future__ import annotations

from pathlib import Path

import torch

from job.artifacts.model_card import ModelCard, save_model
from job.data.preprocessing import Preprocessing
from job.slimming.analysis import analyse
from job.slimming.importance.criteria import gamma_importance
from job.slimming.planning.allocation import Allocation, make_plan
from job.slimming.planning.cost import example_image
from job.slimming.planning.plan import Plan
from job.slimming.planning.target import Budget
from job.slimming.surgery.surgery import apply_plan

NAMES = ("cat", "dog", "emu")


def randomise(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights, γ > 0 and running statistics, as after some training; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                count = layer.num_features
                for tensor, scale, least in (
                    (layer.weight, torch.rand(count, generator=generator), 0.1),
                    (layer.bias, torch.randn(count, generator=generator) * 0.3, 0),
                    (layer.running_mean, torch.randn(count, generator=generator) * 0.2, 0),
                    (layer.running_var, torch.rand(count, generator=generator), 0.5),
                ):
                    if tensor is not None:
                        tensor.copy_(scale + least)
    return network.eval()


def uniform(network: torch.nn.Module, width: float, size: int = 64) -> Plan:
    """The homework's plan: the same fraction of each group of channels, by γ."""
    graph = analyse(network, example_image(size))
    allocation = Allocation("uniform", Budget("width", width))
    return make_plan(network, graph, gamma_importance(network, graph), allocation)


def save_slim_student(folder: Path) -> Path:
    """A StudentNet of half the width and three classes as a model folder, random weights."""
    card = ModelCard(
        "student", {"base": 2}, 3, preprocessing=Preprocessing.of("imagenet", 48), class_names=NAMES
    )
    torch.manual_seed(0)
    network = randomise(card.build())
    plan = uniform(network, 0.5)
    save_model(folder, apply_plan(network, plan.layers), card.cut(plan.layers, 0.5))
    return folder
