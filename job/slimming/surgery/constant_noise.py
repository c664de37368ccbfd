"""Random numbers of a forward pass, replaced by constants while a cut is verified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

DROPOUTS = frozenset(
    """dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    feature_alpha_dropout""".split()
)
NOISE = frozenset(
    """rand rand_like randn randn_like normal normal_ uniform_ exponential_ log_normal_ cauchy_
    bernoulli_""".split()
)
NOISE_VALUE = 0.5


class ConstantNoise(TorchFunctionMode):
    """Replace random numbers that are drawn for each value of a tensor by constants.

    They are drawn independently, so that it makes no difference which of them a channel gets: with
    one constant for all, the narrow network is compared with the wide one on equal noise. Dropout
    keeps all values. Other random numbers, such as indices, are drawn as they are; the generators
    do not advance for those that are replaced, whose number depends on the channels.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in MEANS and isinstance(result := MEANS[name](*args, **kwargs), torch.Tensor):
            return result
        if name not in NOISE:
            return func(*args, **kwargs)
        state = torch.get_rng_state()
        try:
            return func(*args, **kwargs).fill_(NOISE_VALUE)
        finally:
            torch.set_rng_state(state)


def _bernoulli(input: torch.Tensor, p: Any = None, **_: Any) -> torch.Tensor:
    return input.clone() if p is None else torch.full_like(input, p)


def _normal(mean: Any = 0.0, std: Any = 1.0, *_: Any, **__: Any) -> Any:
    return mean + NOISE_VALUE * std  # a number if both are


def _gumbel_softmax(
    logits: torch.Tensor, tau: float = 1, hard: bool = False, eps: float = 0.0, dim: int = -1
) -> torch.Tensor:
    soft = torch.special.softmax(logits / tau, dim)  # not counted as a softmax of the network
    highest = soft.argmax(dim, keepdim=True)
    return torch.zeros_like(soft).scatter_(dim, highest, 1.0) if hard else soft


# results for noise that is computed from tensors, on which they continue to depend
MEANS: dict[str, Callable[..., Any]] = {
    "bernoulli": _bernoulli,
    "normal": _normal,
    "gumbel_softmax": _gumbel_softmax,
}
