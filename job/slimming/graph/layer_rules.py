"""Layer rules: the effect of convolutions, linear layers and BatchNorms on channels.

To add a kind of layer, add a ``LayerRule`` to the table ``LAYER_RULES`` at the end. It contains the
types, the torch functions that they call, the effect of these on channels, and the axes and
attributes of the layer that count them. Surgery, verification and costs use the same entry.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from job.slimming.graph.computed_weights import computed_from, end_computed, standardise
from job.slimming.graph.convolution_rules import (
    computed_weight,
    convolution,
    deformable_convolution,
    transposed_convolution,
)
from job.slimming.graph.followed_parameters import produce
from job.slimming.graph.layers import (
    BATCHNORM,
    CONVOLUTIONS,
    INPUT_WEIGHTS,
    INSTANCENORM,
    TRANSPOSED,
    owner_of,
)
from job.slimming.graph.multihead_rule import multi_head_attention
from job.slimming.graph.norm_rules import group_norm, instance_norm, layer_norm
from job.slimming.graph.place_rules import already_spaced
from job.slimming.graph.reasons import (
    COMPUTED_OR_MIXED,
    COMPUTED_WEIGHT_OR_MIXED,
    CONSTANT,
    SELECTION,
)
from job.slimming.graph.recurrent_rules import recurrent
from job.slimming.graph.removed_layers import ConstantOutput
from job.slimming.graph.selection import SelectedChannels
from job.slimming.graph.spaced import SpacedConvolution
from job.slimming.graph.union import ChannelSlot, Ids, Side

if TYPE_CHECKING:
    from collections.abc import Mapping

    from job.slimming.graph.propagation_state import PropagationState, Rule
    from job.slimming.graph.trace import Op

DEFORMABLE = ("torchvision.ops.deform_conv.DeformConv2d",)
STATISTICS = ("running_mean", "running_var", "weight", "bias")  # in the order of F.batch_norm


@dataclass(frozen=True)
class LayerRule:
    """Effect of layers of the given types on channels.

    ``propagate`` is the rule of the torch functions ``ops``, whose argument number 1 is the weight.
    ``tensors`` gives the side along each leading axis of the layer's tensors, ``sizes`` the side
    that each of its attributes counts; ``whole`` is an axis that is never cut. ``names`` are the
    full names of types of packages that are slow to import.
    """

    types: tuple[type[nn.Module], ...]
    ops: tuple[str, ...]
    propagate: Rule
    tensors: Mapping[str, tuple[Side, ...]]
    sizes: Mapping[str, Side] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def covers(self, kind: type[Any]) -> bool:
        """Return whether this is the rule of the layers of a class."""
        if issubclass(kind, self.types):
            return True
        return any(f"{c.__module__}.{c.__qualname__}" in self.names for c in kind.__mro__)


def linear(state: PropagationState, op: Op) -> None:
    """Propagate channels through a linear layer, whose inputs are along the last axis."""
    image, weight = op.argument(0, "input"), op.argument(1, "weight")
    name, labels = state.trace.name(weight), state.labels_of(image)
    state.count_call(op, name)
    if labels is not None and labels.shape[-1] == 1 and image.shape[-1] > 1:
        return state.set_labels(op.result, labels)  # channels are along another axis
    ids, computed = state.ids_of_lines(image, -1), name is None
    name = name or computed_from(state, op, weight)
    if ids is None or name is None:
        reason = computed_weight(op.module) if name is None else None
        return state.give_up(op, reason or COMPUTED_WEIGHT_OR_MIXED("a linear layer"))
    state.add_slot(name, "in", ids)
    produced = produce(state, op, name, weight.shape[0])
    if computed:
        end_computed(state, op, name, weight, ids, produced)
    return state.set_ids(op.result, produced, op.result.dim() - 1)


def constant(state: PropagationState, op: Op) -> None:
    """Produce the channels of a layer without inputs, whose output is its bias."""
    name = state.trace.name(op.argument(2, "bias"))
    if name is None:
        return state.give_up(op, CONSTANT())
    produced = produce(state, op, f"{owner_of(name)}.weight", len(op.argument(2, "bias")))
    axis = op.result.dim() - 1 if op.argument(1, "geometry") is None else 1
    return state.set_ids(op.result, produced, axis)


def batch_norm(state: PropagationState, op: Op) -> None:
    """Pass channels through a BatchNorm, or select them from a stream that other ops use."""
    image = op.argument(0, "input")
    labels = state.labels_of(image)
    if labels is None and standardise(state, op, state.call_number(op)):
        return state.forget(op)
    tensors = [op.argument(place, name) for place, name in enumerate(STATISTICS, 1)]
    names = [state.trace.name(tensor) for tensor in tensors if tensor is not None]
    layers = list(dict.fromkeys(owner_of(name) for name in names if name))
    if labels is not None and labels.shape[1] == 1 < labels.numel():
        return state.set_labels(op.result, labels)  # channels are along another axis
    ids = state.ids_along(image, 1)
    if names:
        norms = all(isinstance(state.modules[layer], BATCHNORM) for layer in layers)
        if ids is None or None in names or not norms:
            return state.give_up(op, COMPUTED_OR_MIXED("a BatchNorm"))
        if (selecting := _selecting(state, op, layers)) is not None:
            return _select_channels(state, op, selecting, ids)
        for layer in layers:  # several, where they share some tensors
            state.passed.add(layer)
            state.add_slot(f"{layer}.weight", "through", ids)
    elif ids is not None and labels is not None:
        state.add_module_slot(op, ids)
    return state.forget(op) if labels is None else state.set_labels(op.result, labels)


def _selecting(state: PropagationState, op: Op, layers: list[str]) -> str | None:
    """Return the name of the layer that selects channels here, or None."""
    layer = layers[0]
    if isinstance(state.modules[owner_of(layer)], SelectedChannels):
        return owner_of(layer)
    shared = state.is_shared(op.argument(0, "input"))
    return layer if shared and layer not in state.not_selecting and len(layers) == 1 else None


def _select_channels(state: PropagationState, op: Op, layer: str, ids: Ids) -> None:
    image = op.argument(0, "input")
    state.fix(image, SELECTION())
    if layer not in state.selected:
        state.selected[layer] = state.union.produce(layer, len(ids))
        state.streams[layer] = ids
        state.union.slots.append(ChannelSlot(layer, "select", state.selected[layer]))
    state.set_ids(op.result, state.selected[layer], 1)


LAYER_RULES: list[LayerRule] = [
    LayerRule(
        types=CONVOLUTIONS,
        ops=("conv1d", "conv2d", "conv3d"),
        propagate=convolution,
        tensors={"weight": ("out", "in"), "bias": ("out",)},
        sizes={"in_channels": "in", "out_channels": "out"},
    ),
    LayerRule(
        types=(SpacedConvolution,),
        ops=("spaced_convolution",),
        propagate=already_spaced,
        tensors={"indices": ("places",)},
        sizes={"in_channels": "whole", "out_channels": "whole"},
    ),
    LayerRule(
        types=TRANSPOSED,
        ops=("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        propagate=transposed_convolution,
        tensors={"weight": ("in", "out"), "bias": ("out",)},
        sizes={"in_channels": "in", "out_channels": "out"},
    ),
    LayerRule(
        types=(),
        names=DEFORMABLE,
        ops=("deform_conv2d",),
        propagate=deformable_convolution,
        tensors={"weight": ("out", "in"), "bias": ("out",)},
        sizes={"in_channels": "in", "out_channels": "out"},
    ),
    LayerRule(
        types=(nn.Linear,),
        ops=("linear",),
        propagate=linear,
        tensors={"weight": ("out", "in"), "bias": ("out",)},
        sizes={"in_features": "in", "out_features": "out"},
    ),
    LayerRule(
        types=(BATCHNORM,),
        ops=("batch_norm",),
        propagate=batch_norm,
        tensors=dict.fromkeys(STATISTICS, ("through",)),
        sizes={"num_features": "through"},
    ),
    LayerRule(
        types=(ConstantOutput,),
        ops=("constant_output",),
        propagate=constant,
        tensors={"bias": ("out",)},
        sizes={"out_channels": "out"},
    ),
    LayerRule(
        types=(nn.RNNBase,),
        ops=("lstm", "gru", "rnn_tanh", "rnn_relu"),
        propagate=recurrent,
        tensors=dict.fromkeys(INPUT_WEIGHTS, ("whole", "in")),
        sizes={"input_size": "in", "hidden_size": "whole"},
    ),
    LayerRule(
        types=(nn.MultiheadAttention,),
        ops=("multi_head_attention_forward",),
        propagate=multi_head_attention,
        tensors={"in_proj_weight": ("out", "in"), "in_proj_bias": ("out",)},
        sizes=dict.fromkeys(("embed_dim", "kdim", "vdim"), "in"),
    ),
    LayerRule(
        types=(INSTANCENORM,),
        ops=("instance_norm",),
        propagate=instance_norm,
        tensors=dict.fromkeys(STATISTICS, ("through",)),
        sizes={"num_features": "through"},
    ),
    LayerRule(
        types=(nn.LayerNorm, nn.RMSNorm),
        ops=("layer_norm", "rms_norm"),
        propagate=layer_norm,
        tensors={"weight": ("through",), "bias": ("through",)},
        sizes={"normalized_shape": "through"},
    ),
    LayerRule(
        types=(nn.GroupNorm,),
        ops=("group_norm",),
        propagate=group_norm,
        tensors={"weight": ("through",), "bias": ("through",)},
        sizes={"num_channels": "through"},
    ),
]


def layer_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule of a layer; None for modules of other types."""
    kind: Any = type(module)
    return _rule_of(kind, len(LAYER_RULES))


@functools.lru_cache(maxsize=4096)
def _rule_of(kind: type[Any], _: int) -> LayerRule | None:
    """Return the rule of a class, which is looked up again when a rule has been added."""
    return next((rule for rule in LAYER_RULES if rule.covers(kind)), None)


def is_layer(module: nn.Module | None) -> bool:
    """Return whether a module is a layer with a rule."""
    return module is not None and layer_rule(module) is not None


def _size(value: Any) -> int:
    """Return the number of channels in an attribute, which is a number or a shape."""
    if not isinstance(value, (tuple, list)):
        return int(value)
    return int(value[-1] if max(value[1:], default=1) > 1 else value[0])


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output channels of a layer with a rule."""
    rule = layer_rule(layer)
    assert rule is not None
    counts = {side: _size(getattr(layer, name)) for name, side in rule.sizes.items()}
    through = counts.get("through", counts.get("whole", 0))
    return counts.get("in", through), counts.get("out", through)
