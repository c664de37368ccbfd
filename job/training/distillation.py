"""Knowledge distillation: train a network on a teacher's outputs as well as on the labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from job.models.outputs import logits_of
from job.slimming.calibration.memory_format import ImageFormat

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


@dataclass(frozen=True)
class Distillation:
    """A teacher on the device, and the weight ``alpha`` of its outputs in the loss."""

    teacher: nn.Module
    alpha: float
    temperature: float
    accelerator: Accelerator
    fitted: ImageFormat

    def outputs(self, inputs: torch.Tensor) -> Any:
        """Return the outputs of the teacher."""
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher(self.fitted(inputs))

    def loss(
        self, logits: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the summed loss for a student's ``logits`` (B, C) and ``inputs`` (B, 3, H, W)."""
        soft_targets = logits_of(self.outputs(inputs)).float()
        return distillation_loss(logits, soft_targets, labels, self.alpha, self.temperature)


def distillation(
    teacher: nn.Module, alpha: float, temperature: float, accelerator: Accelerator
) -> Distillation:
    """Return the distillation from a copy of ``teacher`` on the device, in eval mode."""
    placed = copy.deepcopy(teacher).eval().requires_grad_(False).to(accelerator.device)
    return Distillation(placed, alpha, temperature, accelerator, ImageFormat(placed))


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """Return alpha·T²·KL(teacher ‖ student, at temperature T) + (1 - alpha)·cross entropy.

    Takes logits (B, C) and labels (B,). The losses are summed over the batch
    (Hinton et al. 2015, section 2).
    """
    soft = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="sum",
        log_target=True,
    )
    hard = F.cross_entropy(student, labels, reduction="sum")
    return alpha * temperature**2 * soft + (1 - alpha) * hard
