"""A check of a cut that shares no code with the verification of the project.

The narrow network is compared with a wide one in which the removed channels are zero: the rows of
the layers that produce them, with γ and β of their norms, and the columns of the layers that read
them. Norms over channels are computed from the channels that are left, and so are softmaxes, means
and maxima over channels: columns that are zero in every row are left out. Weights that are
standardised in each pass are standardised over the inputs that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from job.slimming.inputs import tensors_in
from job.slimming.planning.layer_channels import LayerChannels, Layers

Run = Callable[[nn.Module, torch.Tensor], Any]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
OVER_CHANNELS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
TOLERANCE = 1e-6  # float32 weights that make up for the scale of attention are rounded


def outputs64(network: nn.Module, run: Run, images: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of a copy in float64."""
    with torch.no_grad():
        twin = copy.deepcopy(network).double().eval()
        with _ChannelsLeft():
            outputs = run(twin, images.double())
        return [t for t in tensors_in(outputs) if t.is_floating_point()]


def without_channels(network: nn.Module, layers: Layers) -> nn.Module:
    """A copy in which the channels that ``layers`` removes are zero."""
    wide = copy.deepcopy(network)
    modules, parameters = dict(wide.named_modules()), dict(wide.named_parameters())
    with torch.no_grad():
        for name, channels in layers.items():
            if name in modules and isinstance(modules[name], OVER_CHANNELS):
                if channels.out is not None:
                    wide.set_submodule(name, _KeptNorm(modules[name], channels.out))
            elif name in modules:
                _zero_layer(modules[name], channels)
                if "StdConv" in type(modules[name]).__name__ and channels.in_ is not None:
                    wide.set_submodule(name, _KeptInputs(modules[name], channels.in_))
            elif _is_norm_by_hand(owner := modules.get(name.rpartition(".")[0])):
                if channels.out is not None and not isinstance(owner, _KeptByHand):
                    kept = _KeptByHand(owner, name.rpartition(".")[2], channels.out)
                    wide.set_submodule(name.rpartition(".")[0], kept)
            elif name in parameters:
                _zero_parameter(parameters[name], channels)
    return wide


class _KeptNorm(nn.Module):
    """A norm over channels, in any layout, that is computed from the channels ``kept``."""

    def __init__(self, norm: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.kept = norm, list(kept)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        with _OverKept(self.kept):
            return self.norm(values)


class _KeptInputs(nn.Module):
    """A convolution of timm with a standardised weight, which runs on the inputs ``kept`` alone.

    They are the same in each group.
    """

    def __init__(self, layer: Any, kept: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.kept = layer, list(kept)
        layer.weight = nn.Parameter(layer.weight[:, self.kept[: len(kept) // layer.groups]])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.layer(values[:, self.kept])


def _is_norm_by_hand(module: Any) -> bool:
    """Whether a module is a norm over channels that is not one of torch."""
    by_torch = type(module).__module__.startswith("torch.")
    return "norm" in type(module).__name__.lower() and not by_torch


class _KeptByHand(nn.Module):
    """A norm over channels, written by hand, that is computed from the channels ``kept``.

    The others are zero. ``name`` is a parameter of the norm that has a value for each channel.
    """

    def __init__(self, norm: Any, name: str, kept: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.kept = copy.deepcopy(norm), list(kept)
        self.count = getattr(norm, name).numel()
        for key, values in norm.named_parameters(recurse=False):
            axis = next(n for n, size in enumerate(values.shape) if size == self.count)
            left = values.index_select(axis, torch.tensor(self.kept))
            setattr(self.norm, key, nn.Parameter(left))
        for key, value in vars(norm).items():
            if value in ((self.count,), [self.count], torch.Size((self.count,))):
                setattr(self.norm, key, (len(self.kept),))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        axes = [a for a in (1, values.dim() - 1) if values.shape[a] == self.count]
        axis = getattr(self.norm, "channel_dim", axes[0]) % values.dim()
        kept = torch.tensor(self.kept)
        left = self.norm(values.index_select(axis, kept))
        return torch.zeros_like(values).index_copy(axis, kept, left)


class _OverKept(TorchFunctionMode):
    """Compute the functions that norms call from the channels ``kept``; zeros elsewhere."""

    def __init__(self, kept: list[int]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in (F.layer_norm, F.rms_norm, F.group_norm):
            return func(*args, **(kwargs or {}))
        names = ("input", "groups" if func is F.group_norm else "shape", "weight")
        names += ("eps",) if func is F.rms_norm else ("bias", "eps")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        values, kept = given["input"], self.kept
        weight, bias = (
            None if (t := given.get(n)) is None else t[kept] for n in ("weight", "bias")
        )
        axis = 1 if func is F.group_norm else values.dim() - 1
        left = values.index_select(axis, torch.tensor(kept))
        if func is F.group_norm:
            groups = given.get("groups", given.get("num_groups"))
            groups = len({channel * groups // values.shape[1] for channel in kept})
            left = F.group_norm(left, groups, weight, bias, given.get("eps", 1e-5))
        elif func is F.rms_norm:
            left = F.rms_norm(left, (len(kept),), weight, given.get("eps"))
        else:
            left = F.layer_norm(left, (len(kept),), weight, bias, given.get("eps", 1e-5))
        return torch.zeros_like(values).index_copy(axis, torch.tensor(kept), left)


class _ChannelsLeft(TorchFunctionMode):
    """Leave zeros out: columns of a softmax over the last axis; channels of a mean or maximum."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, given = func.__name__, dict(zip(("input", "dim"), args, strict=False))
        given |= kwargs or {}
        values, axis = given.get("input"), given.get("dim")
        if name == "scaled_dot_product_attention" and not {"attn_mask", "is_causal"} & given.keys():
            query, key, value = args[:3]
            scale = given.get("scale") or query.shape[-1] ** -0.5
            scores = query @ key.mT
            scores = scores.masked_fill((scores == 0).all(-2, keepdim=True), -torch.inf)
            return (scores * scale).softmax(-1) @ value
        if name == "softmax" and values.dim() > 2 and axis in (-1, values.dim() - 1):
            dead = (values == 0).all(-2, keepdim=True)
            args = (values.masked_fill(dead, -torch.inf), *args[1:])
        if name in ("mean", "amax") and axis == 1 and values.dim() == 4:
            alive = (values != 0).any(0).flatten(1).any(1).nonzero().flatten()
            args = (values.index_select(1, alive), *args[1:])
        if name == "mean" and axis == -1 and values.dim() == 4 and values.shape[1:3] == (1, 1):
            alive = (values != 0).flatten(0, 2).any(0).nonzero().flatten()
            args = (values.index_select(3, alive), *args[1:])
        return func(*args, **(kwargs or {}))


def difference(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference of two lists of outputs, relative to the largest value of each output."""
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        scale = float(other.abs().max()) or 1.0
        worst = max(worst, float((one - other).abs().max()) / scale)
    return worst


def _zero_layer(layer: Any, channels: LayerChannels) -> None:
    if isinstance(layer, nn.MultiheadAttention):
        _zero(layer.in_proj_weight, 0, channels.out)
        _zero(layer.in_proj_weight, 1, channels.in_)
        _zero(layer.in_proj_bias, 0, channels.out)
    elif isinstance(layer, nn.RNNBase):
        for name, weight in layer.named_parameters():
            if name.startswith("weight_ih_l0"):
                _zero(weight, 1, channels.in_)
    elif isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        _zero(layer.bias, 0, channels.out)
        _zero_weight(layer, channels)
    else:  # norms that compute each channel for itself, and others with a value for each channel
        for weight in layer.parameters(recurse=False):
            _zero(weight, 0, channels.out)


def _zero_weight(layer: Any, channels: LayerChannels) -> None:
    groups = getattr(layer, "groups", 1)
    # (O, I / G, …), and (I, O / G, …) if transposed
    first, second = channels.out, channels.in_
    if isinstance(layer, TRANSPOSED):
        first, second = second, first
    _zero(layer.weight, 0, first)
    if groups == 1:
        _zero(layer.weight, 1, second)
    elif second is not None and groups != getattr(layer, "in_channels", 0):
        wide = layer.weight.shape[1]
        rows = len(layer.weight) // groups
        for index in set(range(wide * groups)) - set(second):
            part = index // wide
            layer.weight[part * rows : (part + 1) * rows, index % wide] = 0


def _zero_parameter(weight: torch.Tensor, channels: LayerChannels) -> None:
    axis = channels.axis
    if axis is None:
        axis = next((place for place, size in enumerate(weight.shape) if size > 1), 0)
    _zero(weight, axis, channels.out)
    if channels.in_ is not None:
        _zero(weight, 1 - axis if weight.dim() == 2 else 1, channels.in_)


def _zero(weight: torch.Tensor | None, axis: int, kept: tuple[int, ...] | None) -> None:
    if weight is None or kept is None:
        return
    mask = torch.zeros(weight.shape[axis], dtype=weight.dtype)
    mask[list(kept)] = 1
    weight.mul_(mask.view(*[-1 if place == axis else 1 for place in range(weight.dim())]))
