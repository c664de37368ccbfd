"""Modules and tensors of a network by name, and the types of layers that hold channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORM = nn.modules.batchnorm._BatchNorm


def owner_of(name: str) -> str:
    """The name of the module that holds the parameter or module ``name``."""
    return name.rpartition(".")[0]


def modules_of(network: nn.Module, *, once: bool = False) -> dict[str, nn.Module]:
    """All modules by name: shared ones under each of their names, or under the first (``once``)."""
    return dict(network.named_modules(remove_duplicate=once))


def tensors_of(
    network: nn.Module,
) -> Iterator[tuple[str, dict[str, torch.Tensor | None], str, torch.Tensor]]:
    """Each parameter and buffer: its full name, the dict that holds it, its key there, the tensor.

    Shared tensors come under each of their names.
    """
    for name, module in modules_of(network).items():
        prefix = f"{name}." if name else ""
        stores: tuple[dict[str, torch.Tensor | None], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]
        for store in stores:
            for key, tensor in store.items():
                if tensor is not None:
                    yield prefix + key, store, key, tensor
