"""A pass of a proof: on noise, of a copy of a network, without a trace in any state."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from job.slimming.graph.layers import modules_of
from job.slimming.inputs import call_network, tensors_in
from job.slimming.surgery.constant_noise import ConstantNoise
from job.slimming.surgery.double_precision import DoublePrecision
from job.slimming.surgery.probe import probe_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from job.slimming.graph.snapshot import Snapshot
    from job.slimming.inputs import Example
    from job.slimming.surgery.kept_channels import KeptReads


class Probe(NamedTuple):
    """A pass on noise like ``example``, also of heads that run only in train mode (``auxiliary``).

    ``snapshot`` is that of a network with the same code, whose state is restored after each pass.
    If ``widened``, what the code computes in float32 is computed in float64 too.
    """

    example: Example
    auxiliary: bool
    snapshot: Snapshot
    widened: bool = False

    def outputs(
        self, make: Callable[[], nn.Module], kept: KeptReads | None = None
    ) -> list[torch.Tensor]:
        """Return the tensors that the network of ``make`` returns, a copy for this pass alone."""
        try:
            network = make()
            with torch.inference_mode():
                return self._outputs(network, kept)
        except RuntimeError as failure:
            if "does not require grad" not in str(failure):
                raise
        with torch.no_grad():  # code that computes gradients itself, e.g. forces of an energy
            return self._outputs(make(), kept)

    def _outputs(self, network: nn.Module, kept: KeptReads | None) -> list[torch.Tensor]:
        wide = DoublePrecision() if self.widened else nullcontext()
        try:
            _set_proof_mode(network, self.auxiliary)
            torch.default_generator.manual_seed(0)
            noise = noise_for(network, self.example)
            with kept.mode() if kept else nullcontext(), ConstantNoise(), wide:
                return [t.detach() for t in tensors_in(call_network(network, noise))]
        finally:
            self.snapshot.restore()


def noise_for(network: nn.Module, example: Example) -> Any:
    """Return noise like ``example`` in the precision of the network."""
    return probe_batch(example, precision_of(network))


def precision_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter, by default float32."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _set_proof_mode(network: nn.Module, auxiliary: bool) -> None:
    """Put the network in eval mode; with ``auxiliary``, put modules with children in train mode."""
    for module in modules_of(network, once=True).values():
        vars(module)["training"] = auxiliary and any(True for _ in module.children())
