"""Torch functions by what they do to channels."""

from __future__ import annotations

CAT = frozenset({"cat", "concat", "concatenate"})
# over or along the axes that the argument at this position, or ``dim``, gives
AXIS_AT = {
    **dict.fromkeys("mean sum amax amin max min logsumexp std var prod".split(), 1),
    **dict.fromkeys("softmax log_softmax softmin cumsum cumprod".split(), 1),
    **dict.fromkeys("norm linalg_vector_norm normalize".split(), 2),
}
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"})
# several operands, channel by channel
PAIRWISE = frozenset(
    """add add_ __add__ __iadd__ __radd__ sub sub_ __sub__ __isub__ __rsub__ rsub mul mul_ multiply
    __mul__ __imul__ __rmul__ div div_ true_divide __truediv__ __itruediv__ maximum minimum
    where lerp lerp_ copy_ addcmul addcmul_ addcdiv addcdiv_ masked_fill masked_fill_ gt lt ge le
    eq ne __gt__ __lt__ __ge__ __le__ __eq__ __ne__
    """.split()
)
# channel by channel, whatever else they do along other axes
ELEMENTWISE = frozenset(
    """relu relu_ relu6 hardtanh hardtanh_ hardswish hardsigmoid silu gelu sigmoid sigmoid_ tanh
    tanh_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu mish softplus softsign logsigmoid
    hardshrink softshrink tanhshrink threshold threshold_ rrelu dropout dropout1d dropout2d
    dropout3d feature_dropout alpha_dropout feature_alpha_dropout clone contiguous detach to float
    double half bfloat16 type type_as requires_grad_ cpu cuda neg __neg__ abs exp log sqrt rsqrt
    square pow __pow__ clamp clamp_ clip sin cos erf reciprocal max_pool1d max_pool2d max_pool3d
    avg_pool1d avg_pool2d avg_pool3d lp_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d _max_pool2d _adaptive_max_pool2d
    max_pool2d_with_indices adaptive_max_pool2d_with_indices interpolate upsample zeros_like
    ones_like empty_like full_like rand_like randn_like bernoulli
    """.split()
)
# new tensors, of a given shape
FRESH = frozenset("new_empty new_zeros new_ones new_full new_tensor".split())
# data is moved, not changed: run on labels themselves
MOVES = frozenset(
    """permute transpose movedim moveaxis swapaxes swapdims chunk split tensor_split unbind
    __getitem__ narrow select squeeze unsqueeze stack expand expand_as roll flip channel_shuffle
    native_channel_shuffle index_select repeat repeat_interleave t pad pixel_shuffle pixel_unshuffle
    """.split()
)
