"""Op rules: the effect of torch ops on channels. Ops that layers call are in layer_rules.

To add an op, add its name in torch or torch.Tensor to the table ``OP_RULES`` at the end. Most ops
fit an existing rule: ``elementwise``, ``pairwise``, ``along_axes``, ``reshape`` or ``rearrange``. A
new rule is a function of the propagation state and the op. It either labels the results of the op
(``state.set_labels``) or calls ``state.give_up`` with the reason. An op that is not in the table
blocks the channels that it uses.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import torch

from job.slimming.graph.assignment_rules import write
from job.slimming.graph.attention_rules import attention, matmul
from job.slimming.graph.blank_channels import fits_blank
from job.slimming.graph.channel_labels import (
    flat_ids,
    label_axes,
    labels_along,
)
from job.slimming.graph.cross_covariance import weight_columns
from job.slimming.graph.followed_parameters import follow_parameters
from job.slimming.graph.fourier_rules import TRANSFORMS, transform
from job.slimming.graph.image_rules import channel_shuffle, fold, pixel_shuffle, sampled, unfold
from job.slimming.graph.lookup_rule import gathered
from job.slimming.graph.move_rules import cat, glu, pad, rearrange, reshape
from job.slimming.graph.product_rules import (
    distances,
    product,
    product_by_letters,
    sum_of_product,
)
from job.slimming.graph.reasons import (
    ACROSS_CHANNELS,
    ALL_AXES,
    COMPUTED_WEIGHT_OR_MIXED,
    DIFFERENT_AXES,
    MIXED,
    NEVER_CUT,
    NO_CHANNELS,
    ONE_WITH_SEVERAL,
    SEVERAL_INPUTS,
)
from job.slimming.graph.union import ChannelRead, Operand

if TYPE_CHECKING:
    from job.slimming.graph.propagation_state import PropagationState, Rule
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids


def elementwise(state: PropagationState, op: Op) -> None:
    """Keep the labels: ops on each channel alone, such as activations and pooling."""
    image, *others = op.inputs
    labels = state.labels_of(image)
    several = op.name not in LIKE and any(other.numel() > 1 for other in others)
    if labels is None or several:
        return state.give_up(op, SEVERAL_INPUTS(op.name))
    if set(label_axes(labels)) & set(_pooled_axes(op)):
        return state.give_up(op, ACROSS_CHANNELS(op.name))
    for result in op.results:
        same = result.dim() == image.dim()
        if not same or any(result.shape[a] != image.shape[a] for a in label_axes(labels)):
            return state.give_up(op, ACROSS_CHANNELS(op.name))
        state.set_labels(result, labels)
    return None


def _pooled_axes(op: Op) -> range:
    """Return the axes that a pooling op computes over."""
    pooled = re.search(r"pool([123])d", op.name)
    count = op.inputs[0].dim()
    return range(count - int(pooled[1]) if pooled else count, count)


def along_positions(state: PropagationState, op: Op, *, dim_at: int = 1) -> None:
    """Keep the labels of ops along an axis of positions, such as sorting; not along channels."""
    labels, axes = state.labels_of(op.inputs[0]), _axes_of(op, dim_at)
    if labels is None or axes is None:
        return state.give_up(op, ALL_AXES(op.name))
    if axes & set(label_axes(labels)):
        return state.give_up(op, ACROSS_CHANNELS(op.name))
    return along_axes(state, op, dim_at=dim_at)


def along_axes(state: PropagationState, op: Op, *, dim_at: int = 1) -> None:
    """Unite the channels along the axes of ``dim``: sums, maxima, softmax and similar ops.

    ``dim_at`` is the position of the argument ``dim``.
    """
    image, *others = op.inputs
    if len(others) == 1 and op.name in ("max", "min"):  # of two activations
        return pairwise(state, op)
    if op.name == "softmax" and weight_columns(state, op):
        return None
    labels, axes = state.labels_of(image), _axes_of(op, dim_at)
    if axes is None and not op.results[0].dim():
        axes = set(range(image.dim()))
    if labels is None or axes is None or others:
        return state.give_up(op, ALL_AXES(op.name))
    channel_axes = set(label_axes(labels))
    if channel_axes and axes >= channel_axes:
        ids = flat_ids(labels) if len(channel_axes) == 1 else None
        return _across_channels(state, op, ids, min(channel_axes))
    reduces = op.name in REDUCTIONS and len(op.results) == 1
    if reduces and state.heads.reduce_within(labels, axes):
        if state.main:
            state.heads.note_norm(flat_ids(labels), [])
        last = max(channel_axes)
        return _across_channels(state, op, state.unite_lines(labels, last), last)
    first = labels
    for axis in axes & channel_axes:
        first = first.narrow(axis, 0, 1)
    state.union.unite(flat_ids(first.expand_as(labels)), flat_ids(labels))
    for result in op.results:
        result_labels = labels if result.shape == image.shape else first
        if result.dim() < image.dim():
            sizes = [size for axis, size in enumerate(first.shape) if axis not in axes]
            result_labels = first.reshape(sizes)
        state.set_labels(result, result_labels)
    return None


def _across_channels(state: PropagationState, op: Op, ids: Ids | None, axis: int) -> None:
    """Reduce over all channels, or those of each head; the narrow network has fewer of them."""
    image, labels = op.inputs[0], state.labels_of(op.inputs[0])
    indices = [result for result in op.results[1:] if state.trace.is_read(result)]
    same_shape = op.results[0].shape == image.shape
    if ids is None or labels is None or indices or (same_shape and op.name != "normalize"):
        return state.give_up(op, ACROSS_CHANNELS(op.name))
    result_axis = axis if same_shape else None
    state.add_read(op, ChannelRead(op.name, (Operand(0, "input", axis, ids),), result_axis))
    if same_shape:
        return state.set_labels(op.results[0], labels)
    return state.forget(op)


def neighbours(state: PropagationState, op: Op) -> None:
    """Keep the labels of LocalResponseNorm, which normalises over neighbouring kept channels."""
    ids, image = state.ids_along(op.inputs[0], 1), op.inputs[0]
    if ids is None:
        return state.give_up(op, MIXED(op.name))
    state.add_read(op, ChannelRead(op.name, (Operand(0, "input", 1, ids),), 1))
    return state.set_labels(op.result, labels_along(ids, 1, image.dim()))


def _axes_of(op: Op, dim_at: int) -> set[int] | None:
    """Return the axes in the argument ``dim`` of a reduction; None without such an argument."""
    dim = op.argument(dim_at, "dim", op.kwargs.get("axis"))
    dims = [dim] if type(dim) is int else dim
    if not isinstance(dims, (list, tuple)) or not dims:
        return None
    count = op.inputs[0].dim()
    return {axis % count for axis in dims}


def pairwise(state: PropagationState, op: Op) -> None:
    """Unite the channels of several operands: sums, products and similar ops."""
    tensors, dims = op.inputs, op.results[0].dim()
    together: torch.Tensor | None = None
    labelled: list[torch.Tensor] = []  # with the channels of the result
    for tensor in tensors:
        labels = state.labels_of(tensor)
        if labels is None:
            continue
        if labels.dim() > dims:
            return state.give_up(op, NO_CHANNELS(op.name))
        if labels.dim() < dims:
            labels = labels.reshape([1] * (dims - labels.dim()) + list(labels.shape))
        if together is None:
            together, labelled = labels, [tensor]
            continue
        few, many = sorted((labels, together), key=lambda each: len(label_axes(each)))
        if not label_axes(few) and label_axes(many):  # one channel with all others
            state.union.fix(flat_ids(few), ONE_WITH_SEVERAL(op.name))
            together, labelled = many, labelled if many is together else [tensor]
        elif set(label_axes(few)) <= set(label_axes(many)):
            state.union.unite(flat_ids(few.expand_as(many)), flat_ids(many))
            together, labelled = many, [*labelled, tensor]
        elif set(label_axes(few)) & set(label_axes(many)):
            return state.give_up(op, DIFFERENT_AXES(op.name))
        else:  # e.g. weights of positions, the same for all channels
            fewer, together = sorted((labels, together), key=torch.numel)
            state.union.fix(flat_ids(fewer), DIFFERENT_AXES(op.name))
            labelled = [tensor] if together is labels else labelled
    assert together is not None
    for tensor in tensors:
        held = any(tensor is each for each in labelled)
        if not held and not _follows_cut(state, op, tensor, together):
            return state.give_up(op, NEVER_CUT(op.name))
    return state.set_labels(op.results[0], together)


def _follows_cut(
    state: PropagationState, op: Op, tensor: torch.Tensor, labels: torch.Tensor
) -> bool:
    """Return whether an operand without labels broadcasts, or is derived from parameters to cut."""
    missing = labels.dim() - tensor.dim()
    if all(axis < missing for axis in label_axes(labels)):
        return True
    if fits_blank(state, tensor, labels):
        return True
    return follow_parameters(state, op, tensor, labels)


def prelu(state: PropagationState, op: Op) -> None:
    """Keep the labels of PReLU, whose weight has one slope, or one for each channel."""
    image, weight = op.argument(0, "input"), op.argument(1, "weight")
    labels, name = state.labels_of(image), state.trace.name(weight)
    if weight.numel() > 1:
        ids = state.ids_along(image, 1)
        if ids is None or name is None:
            return state.give_up(op, COMPUTED_WEIGHT_OR_MIXED("a PReLU"))
        state.add_slot(name, "through", ids)
    return state.forget(op) if labels is None else state.set_labels(op.result, labels)


def new_tensor(state: PropagationState, op: Op) -> None:
    """Drop the labels: a new tensor of a given shape has no channels."""
    state.forget(op)


def _for_each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


REDUCTIONS = frozenset("mean sum std var norm linalg_vector_norm normalize".split())
CONCATENATIONS = frozenset("cat concat concatenate".split())
LIKE = frozenset(  # a second input gives sizes, or a dtype
    "expand_as view_as reshape_as type_as to".split()
)

OP_RULES: dict[str, Rule] = {
    **_for_each(
        """relu relu_ relu6 hardtanh hardtanh_ hardswish hardsigmoid silu gelu sigmoid sigmoid_
        tanh tanh_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu mish softplus softsign
        logsigmoid hardshrink softshrink tanhshrink threshold threshold_ rrelu dropout dropout1d
        dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout clone contiguous
        detach data to float double half bfloat16 type type_as requires_grad_ cpu cuda neg __neg__
        abs abs_ sign sgn exp exp_ exp2 expm1 log log_ log1p log2 log10 sqrt sqrt_ rsqrt square
        square_ pow pow_ __pow__ clamp clamp_ clamp_min clamp_max clip sin cos tan asin acos atan
        sinh cosh asinh acosh atanh sinc erf erfc logit reciprocal round trunc frac floor ceil
        nan_to_num isnan isinf isfinite logical_not hardswish_ hardsigmoid_ silu_ mish_ max_pool1d
        max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool2d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d _max_pool2d
        _adaptive_max_pool2d max_pool2d_with_indices adaptive_max_pool2d_with_indices interpolate
        upsample zeros_like ones_like empty_like full_like rand_like randn_like bernoulli as_tensor
        normal_ uniform_ exponential_ bernoulli_ fill_ zero_ real imag conj resolve_conj angle""",
        elementwise,
    ),
    **_for_each(
        """add add_ __add__ __iadd__ __radd__ sub sub_ __sub__ __isub__ __rsub__ rsub mul mul_
        multiply __mul__ __imul__ __rmul__ div div_ true_divide __truediv__ __itruediv__ __rdiv__
        __rtruediv__ maximum
        minimum where lerp lerp_ copy_ addcmul addcmul_ addcdiv addcdiv_ masked_fill masked_fill_
        gt lt ge le eq ne __gt__ __lt__ __ge__ __le__ __eq__ __ne__ atan2 hypot fmax fmin copysign
        logaddexp xlogy logical_and logical_or __and__ __or__ max_unpool1d max_unpool2d
        max_unpool3d complex polar normal""",
        pairwise,
    ),
    **_for_each(
        "mean sum amax amin max min logsumexp std var var_mean std_mean nanmean nansum prod",
        along_axes,
    ),
    **_for_each("median cummax cummin logcumsumexp argsort sort", along_positions),
    **_for_each("topk kthvalue quantile diff", partial(along_positions, dim_at=2)),
    **_for_each("softmax log_softmax softmin cumsum cumprod all any _is_all_true", along_axes),
    **_for_each("norm linalg_vector_norm normalize", partial(along_axes, dim_at=2)),
    **dict.fromkeys(CONCATENATIONS, cat),
    **_for_each("view reshape flatten unflatten view_as reshape_as", reshape),
    **_for_each(
        """permute transpose movedim moveaxis swapaxes swapdims squeeze unsqueeze t T mT stack flip
        repeat view_as_real view_as_complex""",
        partial(rearrange, any_size=True),
    ),
    **_for_each(
        """unbind __getitem__ narrow select expand expand_as broadcast_tensors roll index_select
        repeat_interleave pixel_unshuffle embedding""",
        rearrange,
    ),
    **_for_each("channel_shuffle native_channel_shuffle", channel_shuffle),
    **_for_each("chunk split tensor_split", partial(rearrange, splits=True)),
    **_for_each("matmul __matmul__ mm", product),
    "bmm": matmul,
    "addmm": sum_of_product,
    "einsum": product_by_letters,
    "scaled_dot_product_attention": attention,
    **_for_each("new_empty new_zeros new_ones new_full new_tensor no_output", new_tensor),
    **_for_each("roi_align roi_pool grid_sample grid_sampler", sampled),
    **dict.fromkeys(TRANSFORMS, transform),
    "local_response_norm": neighbours,
    **{rule.__name__: rule for rule in (pixel_shuffle, unfold, fold, glu, pad, prelu)},
    "cdist": distances,
    **_for_each("gather take_along_dim", gathered),
    "__setitem__": write,
}

# ops on parameters, whose results are followed to the channels that they are combined with
POINTWISE = frozenset(name for name, rule in OP_RULES.items() if rule in (elementwise, pairwise))
MOVING = CONCATENATIONS | frozenset(
    name
    for name, rule in OP_RULES.items()
    if rule is reshape or getattr(rule, "func", rule) is rearrange
)
