"""The layers of a network and their tensors, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORM = nn.modules.batchnorm._BatchNorm
LAYER_TYPES = (*CONVOLUTIONS, nn.Linear, BATCHNORM)


def owner_of(parameter: str) -> str:
    """The module that a parameter or module belongs to."""
    return parameter.rpartition(".")[0]


def modules_of(network: nn.Module, *, once: bool = False) -> dict[str, nn.Module]:
    """All modules by name, shared ones under each of theirs, or (``once``) under the first.

    Like ``named_modules``, whose nested generators take several times as long.
    """
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting = [("", network)]
    while waiting:
        name, module = waiting.pop()
        if once:
            if module in seen:
                continue
            seen.add(module)
        found[name] = module
        prefix = f"{name}." if name else ""
        children = [(prefix + own, m) for own, m in module._modules.items() if m is not None]
        waiting += reversed(children)
    return found


def tensors_of(
    network: nn.Module,
) -> Iterator[tuple[str, dict[str, torch.Tensor | None], str, torch.Tensor]]:
    """Each parameter and buffer by its full name, with the dict that holds it and its key there.

    Shared ones come under each of their names.
    """
    for name, module in modules_of(network).items():
        prefix = f"{name}." if name else ""
        stores: tuple[dict[str, torch.Tensor | None], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]
        for store in stores:
            for own, tensor in store.items():
                if tensor is not None:
                    yield prefix + own, store, own, tensor
