"""StudentNet without kinks: rounding cannot decide on which side of one a value lies.

ReLU6 and max-pooling pass a gradient on or not, and values near the border differ in rounding
between thread and process counts.
"""

from __future__ import annotations

from torch import nn

from job.models.student import StudentNet


def student(num_classes: int) -> nn.Module:
    """Return StudentNet with Softplus and average pooling: ``--model support.smooth:student``."""
    network = StudentNet(num_classes=num_classes)
    for part in list(network.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(part, name, nn.Softplus())
            elif isinstance(child, nn.MaxPool2d):
                setattr(part, name, nn.AvgPool2d(2))
    return network
