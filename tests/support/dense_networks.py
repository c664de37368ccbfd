"""Small detectors and segmenters, of the kinds that people train: YOLO, U-Net, HRNet, BiSeNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Bottleneck(nn.Module):
    def __init__(self, width: int, *, add: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = conv(width, width), conv(width, width), add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    """Two branches, one of them with bottlenecks (YOLOv5)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = conv(inputs, half, 1), conv(inputs, half, 1)
        self.m, self.cv3 = nn.Sequential(Bottleneck(half, add=True)), conv(outputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """Halves by chunk, all of whose bottlenecks are concatenated (YOLOv8)."""

    def __init__(self, inputs: int, outputs: int, count: int = 2, *, add: bool = True) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = conv(inputs, 2 * self.c, 1), conv((2 + count) * self.c, outputs, 1)
        self.m = nn.ModuleList(self.inner(add=add) for _ in range(count))

    def inner(self, *, add: bool) -> nn.Module:
        return Bottleneck(self.c, add=add)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(layer(parts[-1]) for layer in self.m)
        return self.cv2(torch.cat(parts, 1))


class C3k2(C2f):
    """C2f of C3 (YOLO11)."""

    def inner(self, *, add: bool) -> nn.Module:
        del add
        return C3(self.c, self.c)


class SPPF(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(inputs, inputs // 2, 1), conv(inputs * 2, outputs, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.cv1(x)]
        parts.extend(self.pool(parts[-1]) for _ in range(3))
        return self.cv2(torch.cat(parts, 1))


class DFL(nn.Module):
    """Mean of a distribution over distances, by a convolution that is not trained."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(float(bins)).view(1, bins, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, anchors = x.shape
        x = x.view(batch, 4, self.bins, anchors).transpose(2, 1).softmax(1)
        return self.conv(x).view(batch, 4, anchors)


class Detect(nn.Module):
    """Boxes and classes of each level; in eval mode decoded, with anchor points that are kept."""

    anchors: torch.Tensor | None = None

    def __init__(self, widths: tuple[int, ...], classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.nc, self.reg_max, self.no = classes, bins, classes + 4 * bins
        self.cv2 = nn.ModuleList(
            nn.Sequential(conv(w, 12), conv(12, 12), nn.Conv2d(12, 4 * bins, 1)) for w in widths
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(conv(w, 10), conv(10, 10), nn.Conv2d(10, classes, 1)) for w in widths
        )
        self.dfl = DFL(bins)

    def forward(self, levels: list[torch.Tensor]) -> Any:
        for i in range(len(levels)):
            levels[i] = torch.cat((self.cv2[i](levels[i]), self.cv3[i](levels[i])), 1)
        if self.training:
            return levels
        flat = torch.cat([x.view(x.shape[0], self.no, -1) for x in levels], 2)
        box, classes = flat.split((self.reg_max * 4, self.nc), 1)
        if self.anchors is None or self.anchors.shape[-1] != flat.shape[-1]:
            self.anchors = torch.cat([self.points(x) for x in levels], 1)
        near, far = self.dfl(box).chunk(2, 1)
        boxes = torch.cat((self.anchors - near, self.anchors + far), 1)
        return torch.cat((boxes, classes.sigmoid()), 1), levels

    @staticmethod
    def points(x: torch.Tensor) -> torch.Tensor:
        rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) + 0.5 for n in x.shape[2:])
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)


class Yolo(nn.Module):
    def __init__(self, part: type[C2f] | type[C3] = C2f) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2), conv(8, 16, 3, 2), part(16, 16))
        self.deep = nn.Sequential(conv(16, 24, 3, 2), part(24, 24), SPPF(24, 24))
        self.up, self.down = part(40, 16), conv(16, 16, 3, 2)
        self.out, self.detect = part(40, 24), Detect((16, 24))

    def forward(self, images: torch.Tensor) -> Any:
        fine = self.stem(images)
        deep = self.deep(fine)
        fine = self.up(torch.cat((F.interpolate(deep, scale_factor=2.0), fine), 1))
        return self.detect([fine, self.out(torch.cat((self.down(fine), deep), 1))])


class UNet(nn.Module):
    """Skips by concatenation, transposed convolutions on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle, self.bottom = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up1, self.join1 = nn.ConvTranspose2d(16, 12, 2, 2), conv(24, 12)
        self.up2, self.join2 = nn.ConvTranspose2d(12, 8, 2, 2), conv(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        one = self.enter(images)
        two = self.middle(F.max_pool2d(one, 2))
        low = self.bottom(F.max_pool2d(two, 2))
        two = self.join1(torch.cat((two, self.up1(low)), 1))
        return self.head(self.join2(torch.cat((one, self.up2(two)), 1)))


class HighResolution(nn.Module):
    """Streams of three resolutions that are summed into each other (HRNet)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 12, 16)
        self.stem = conv(3, 8, 3, 2)
        self.start = nn.ModuleList([conv(8, 8), conv(8, 12, 3, 2), conv(12, 16, 3, 2)])
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(self.between(widths, i, j) for j in range(3)) for i in range(3)
            )
            for _ in range(2)
        )
        self.head = nn.Conv2d(sum(widths), 4, 1)

    @staticmethod
    def between(widths: tuple[int, ...], to: int, of: int) -> nn.Module:
        if to == of:
            return Bottleneck(widths[of], add=True)
        if of > to:
            return nn.Sequential(nn.Conv2d(widths[of], widths[to], 1), nn.BatchNorm2d(widths[to]))
        steps = [conv(widths[of], widths[of], 3, 2) for _ in range(to - of - 1)]
        return nn.Sequential(*steps, conv(widths[of], widths[to], 3, 2))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(images)
        streams = [self.start[0](x)]
        streams += [self.start[1](streams[0])]
        streams += [self.start[2](streams[1])]
        for stage in self.stages:
            streams = [self.fuse(row, streams, i) for i, row in enumerate(stage)]  # type: ignore[arg-type]
        size = streams[0].shape[-2:]
        levels = [F.interpolate(s, size, mode="bilinear", align_corners=False) for s in streams]
        return {"heat": self.head(torch.cat(levels, 1))}

    @staticmethod
    def fuse(row: Any, streams: list[torch.Tensor], to: int) -> torch.Tensor:
        total = row[0](streams[0])
        for layer, stream in zip(row[1:], streams[1:], strict=True):
            part = layer(stream)
            if part.shape != total.shape:
                part = F.interpolate(part, streams[to].shape[-2:])
                total = F.interpolate(total, streams[to].shape[-2:])
            total = total + part
        return F.relu(total)


@dataclass
class Segments:
    """Output of BiSeNet: the logits, and those of auxiliary heads in train mode."""

    logits: torch.Tensor
    auxiliary: tuple[torch.Tensor, ...] = ()


class TwoPaths(nn.Module):
    """A path of detail and one of context, refined by attention over channels (BiSeNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential(conv(3, 8, 3, 2), conv(8, 12, 3, 2))
        self.context = nn.Sequential(conv(3, 8, 3, 2), conv(8, 12, 3, 2))
        self.deep = conv(12, 16, 3, 2)
        self.refine = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Sigmoid())
        self.enter = conv(16, 12, 1)
        self.fuse = conv(24, 16, 1)
        self.gate = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Sigmoid())
        self.head, self.aux = nn.Conv2d(16, 3, 1), nn.Conv2d(12, 3, 1)

    def forward(self, images: torch.Tensor) -> Segments:
        context = self.context(images)
        deep = self.deep(context)
        deep = deep * self.refine(F.adaptive_avg_pool2d(deep, 1))
        deep = F.interpolate(self.enter(deep), context.shape[-2:]) + context
        fused = self.fuse(torch.cat((self.spatial(images), deep), 1))
        fused = fused + fused * self.gate(fused.mean((2, 3), keepdim=True))
        logits = F.interpolate(self.head(fused), images.shape[-2:], mode="bilinear")
        return Segments(logits, (self.aux(deep),) if self.training else ())
