"""Fourier transforms of maps, which leave channels where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.slimming.graph.channel_labels import label_axes
from job.slimming.graph.reasons import ACROSS_CHANNELS

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState
    from job.slimming.graph.trace import Op

_KINDS = "fft ifft rfft irfft hfft ihfft"  # torch.fft.fft, fft2, fftn and so on
TRANSFORMS = frozenset(f"fft_{kind}{axes}" for kind in _KINDS.split() for axes in ("", "2", "n"))


def transform(state: PropagationState, op: Op) -> None:
    """Keep the labels of a transform along places; along channels it mixes them."""
    image = op.inputs[0]
    labels = state.labels_of(image)
    if labels is None or set(_axes(op, image.dim())) & set(label_axes(labels)):
        return state.give_up(op, ACROSS_CHANNELS(op.name))
    return state.set_labels(op.result, labels)


def _axes(op: Op, count: int) -> list[int]:
    """Return the axes that a transform of ``count`` axes is along, by default as in torch.fft."""
    default = {"2": (-2, -1), "n": None}.get(op.name[-1], -1)
    axes = op.argument(2, "dim", default)
    if axes is None:
        sizes = op.argument(1, "s")
        axes = range(count - (count if sizes is None else len(sizes)), count)
    return [axis % count for axis in ((axes,) if isinstance(axes, int) else axes)]
