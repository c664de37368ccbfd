"""A network of the run with its card and its channel groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from job.slimming.analysis import analyse
from job.slimming.planning.cost import example_image

if TYPE_CHECKING:
    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.slimming.graph.groups import ChannelGraph
    from job.slimming.sensitivity.record import Sensitivity


@dataclass(frozen=True, eq=False)
class Model:
    """A network and its card.

    ``sensitivity`` holds the losses measured for the cut that created the network, if any.
    """

    network: nn.Module
    card: ModelCard
    sensitivity: Sensitivity | None = None

    @cached_property
    def graph(self) -> ChannelGraph:
        """The channel groups of the network, which is traced once; see `analyse` for its errors."""
        return analyse(self.network, example_image(self.card.preprocessing.input_size))
