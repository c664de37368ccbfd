"""Method of a cut, and the best choice where an option is not given."""

from __future__ import annotations

from dataclasses import dataclass

from job.slimming.compensation.methods import COMPENSATIONS
from job.slimming.importance.criteria import CRITERIA
from job.slimming.planning.policies import POLICIES

ALLOCATIONS = ("outputs", "local")
DEPTHS = ("auto", "off")


@dataclass(frozen=True)
class Method:
    """Method of a cut: importance criterion, compensation of removed channels, seed, allocation.

    ``allocate`` is what a global cut compares groups by: ``outputs``, the ``output_loss`` when each
    is cut (None for that of their shape), or ``local``, the importance of the channels. ``depth``
    is whether branches may be removed where the outputs lose least (``auto``) or not (``off``).
    """

    importance: str = "gamma"
    compensate: str = "none"
    seed: int = 0
    allocate: str = "local"
    depth: str = "off"
    output_loss: str | None = None

    def __str__(self) -> str:
        outputs = ", allocation outputs" if self.allocate == "outputs" else ""
        return f"importance {self.importance}, compensation {self.compensate}{outputs}"


def choose_method(
    importance: str | None,
    compensate: str | None,
    allocate: str | None = None,
    *,
    images: bool,
    depth: str = "auto",
    policy: str = "global",
    seed: int = 0,
) -> tuple[Method, str]:
    """Return the method, and a message that explains it; None selects the best choice.

    It depends on whether there are calibration ``images``, and on the ``policy``. The message is
    empty if importance and compensation are given. Refit and output losses assume regress.
    """
    best_compensation = compensate or ("regress" if images else "none")
    refits = images and best_compensation == "regress"
    allocate = choose_allocation(allocate, best_compensation if images else "none", policy)
    method = Method(
        importance or ("refit" if refits else "gamma"),
        best_compensation,
        seed,
        allocate,
        choose_depth(depth, allocate),
    )
    if importance and compensate:
        return method, ""
    why = "by the calibration images" if images else "there are no calibration images"
    return method, f"{method}: {why}"


def choose_allocation(allocate: str | None, compensate: str, policy: str) -> str:
    """Return the allocation; None selects the best choice.

    Only some policies compare groups. Output losses are measured after a fit as in ``regress``.
    """
    if not POLICIES[policy].compares_groups:
        return "local"
    return allocate or ("outputs" if compensate == "regress" else "local")


def choose_depth(depth: str, allocate: str) -> str:
    """Return the depth: only the loss of the outputs tells where a branch can be removed."""
    return depth if allocate == "outputs" else "off"


def options_needing_images(
    importance: str | None, compensate: str | None, allocate: str | None = None
) -> list[str]:
    """Return the options, as typed, that need calibration images."""
    options = []
    if importance and CRITERIA[importance].images:
        options.append(f"--importance {importance}")
    if compensate and COMPENSATIONS[compensate].images:
        options.append(f"--compensate {compensate}")
    if allocate == "outputs":
        options.append(f"--allocate {allocate}")
    return options
