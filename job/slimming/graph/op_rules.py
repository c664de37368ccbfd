"""What stands between layers: activations, sums, concatenations, views, slices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from job.slimming.graph.activations import Activations
from job.slimming.graph.channel_labels import axes, axes_given, joined, moved, plain, reshaped

if TYPE_CHECKING:
    from job.slimming.graph.trace import Op
    from job.slimming.graph.union import Ids

# whatever the number of channels is
HARMLESS = frozenset(
    """permute transpose movedim moveaxis swapaxes swapdims squeeze unsqueeze t stack flip repeat
    """.split()
)


class Between(Activations):
    """Rules for ops that have no weights."""

    def elementwise(self, op: Op) -> None:
        """Channel by channel: activations, pooling."""
        image, *others = op.inputs()
        found = self.of(image)
        if found is None or any(other.numel() > 1 for other in others):
            return self.give_up(op, f"{op.name} of several activations is not understood")
        for result in op.results():
            same = result.dim() == image.dim()
            if not same or any(result.shape[a] != image.shape[a] for a in axes(found)):
                return self.give_up(op, f"{op.name} across channels is not understood")
            self.set(result, found, shared=self.wide)
        return None

    def along(self, op: Op) -> None:
        """Sums, maxima, softmax and the like: what meets along an axis is cut together."""
        image, *others = op.inputs()
        found, places = self.of(image), axes_given(op)
        if found is None or places is None or others:
            return self.give_up(op, f"{op.name} of everything is not understood")
        own = set(axes(found))
        if own and places >= own:
            return self.give_up(op, f"{op.name} across channels is not understood")
        first = found
        for axis in places & own:
            first = first.narrow(axis, 0, 1)
        self.flow.tie(plain(first.expand_as(found)), plain(found))
        for result in op.results():
            labels = found if result.shape == image.shape else first
            if result.dim() < image.dim():
                kept = [size for axis, size in enumerate(first.shape) if axis not in places]
                labels = first.reshape(kept)
            self.set(result, labels, shared=self.wide)
        return None

    def glu(self, op: Op) -> None:
        """One half of the channels times the other's sigmoid (Dauphin et al. 2017)."""
        image = next(op.inputs())
        axis = op.argument(1, "dim", -1) % image.dim()
        ids, found = self.ids(image, axis), self.of(image)
        if found is not None and axis not in axes(found):
            return self.set(op.result, found, shared=self.wide)
        if ids is None:
            return self.give_up(op, "glu of channels along several axes")
        half, gate = np.split(ids, 2)
        self.flow.tie(half, gate)
        return self.lay(op.result, half, axis, shared=self.wide)

    def pairwise(self, op: Op) -> None:
        """Sums and products: channels that meet are cut together."""
        tensors, dims = list(op.inputs()), next(op.results()).dim()
        together: torch.Tensor | None = None
        for tensor in tensors:
            found = self.of(tensor)
            if found is None:
                continue
            if found.dim() > dims:
                return self.give_up(op, f"{op.name} that gives no channels is not understood")
            if found.dim() < dims:
                found = found.reshape([1] * (dims - found.dim()) + list(found.shape))
            if together is None:
                together = found
                continue
            few, together = sorted((found, together), key=lambda labels: len(axes(labels)))
            if not axes(few) and axes(together):  # one that all channels meet
                self.flow.fix(plain(few), f"{op.name} of one channel with several")
                continue
            if not set(axes(few)) <= set(axes(together)):
                return self.give_up(op, f"{op.name} of channels along different axes")
            self.flow.tie(plain(few.expand_as(together)), plain(together))
        assert together is not None
        for tensor in tensors:
            if self.of(tensor) is None and not self.stays(tensor, together):
                return self.give_up(op, f"{op.name} with channels that are always there")
        return self.set(next(op.results()), together, shared=self.wide)

    def stays(self, tensor: torch.Tensor, labels: torch.Tensor) -> bool:
        """Whether an operand without labels is the same for all channels, or a parameter to cut."""
        missing = labels.dim() - tensor.dim()
        own = [a - missing for a in axes(labels) if a >= missing and tensor.shape[a - missing] > 1]
        if not own:
            return True
        name = self.trace.name(tensor)
        first = next(axis for axis, size in enumerate(tensor.shape) if size > 1)
        if name is None or own != [first] or len(axes(labels)) > 1:
            return False
        self.note(name, "through", plain(labels))
        return True

    def cat(self, op: Op) -> None:
        """Concatenation along the channels, or of the same channels along another axis."""
        axis = op.argument(1, "dim", op.kwargs.get("axis", 0)) % op.result.dim()
        parts = []
        for tensor in op.argument(0, "tensors"):
            found = self.of(tensor)
            if found is None:
                found = torch.zeros([1] * tensor.dim(), dtype=torch.int64)
            shape = list(found.shape)
            shape[axis] = tensor.shape[axis]
            parts.append(found.expand(shape))
        labels = joined(parts, axis)
        if labels is not None:
            return self.set(op.result, labels, shared=self.wide)
        ends = {tuple(axes(part.narrow(axis, 0, 1))) for part in parts}
        if len(ends) > 1 or any(part.shape[axis] > 1 and part.stride(axis) for part in parts):
            return self.give_up(op, "cat of different channels")
        first = parts[0].narrow(axis, 0, 1)
        for part in parts[1:]:  # along another axis: channel by channel
            self.flow.tie(plain(first), plain(part.narrow(axis, 0, 1)))
        return self.set(op.result, first, shared=self.wide)

    def reshape(self, op: Op) -> None:
        """Views: channels split into groups, or merged with the places that follow them."""
        image, result = next(op.inputs()), op.result
        found = self.of(image)
        outcome = None if found is None else reshaped(found, image.shape, result.shape)
        if outcome is None:
            return self.give_up(op, f"{op.name} that mixes channels")
        labels, split = outcome
        if split:  # (groups, channels of each): the same ones stay in every group
            own = axes(labels)
            lines = plain(labels).reshape(-1, labels.shape[own[-1]])
            for line in lines[1:]:
                self.flow.tie(lines[0], line)
        free = op.name == "flatten" or (op.name in ("view", "reshape") and op.args[-1] == -1)
        if split or not free:
            self.flow.suspects.append((op.name, plain(labels)))
        return self.set(result, labels, shared=self.wide)

    def move(self, op: Op) -> None:
        """Slices, transposes, shuffles."""
        outcomes = moved(op, self.of)
        sources = [found for tensor in op.inputs() if (found := self.of(tensor)) is not None]
        if outcomes is None:
            return self.give_up(op, f"{op.name} is not understood here")
        before = np.concatenate([plain(labels) for labels in sources])
        if op.name in ("chunk", "split", "tensor_split") and len(outcomes) > 1:
            parts = [plain(labels) for labels in outcomes]
            if {len(part) for part in parts} == {len(before) / len(parts)}:
                self.flow.blocks.append(np.stack(parts))
                sources = []
        for result, labels in zip(op.results(), outcomes, strict=True):
            after = plain(labels)
            same = len(before) == len(after) and bool((before == after).all())
            if op.name not in HARMLESS and not (same and not op.name.startswith("expand")):
                self.flow.suspects += [(op.name, before), (op.name, after)]
                if len(sources) == 1:
                    self.slice(before, after)
            self.set(result, labels, shared=self.wide)
        return None

    def slice(self, before: Ids, after: Ids) -> None:
        """Remember where channels (n,) are cut into parts, of which ``after`` is one."""
        if not len(after):
            return
        start = int(np.argmax(before == after[0]))
        if len(after) < len(before) and np.array_equal(before[start : start + len(after)], after):
            bounds = self.bounds.setdefault(before.tobytes(), (before, set()))[1]
            bounds.update((start, start + len(after)))

    def parts(self) -> None:
        """As many channels must stay in each part, so that fractions of them stay fractions."""
        for channels, bounds in self.bounds.values():
            size = math.gcd(len(channels), *bounds)
            if size == 1:
                self.flow.fix(channels, "slices of it have no common part")
            else:
                self.flow.blocks.append(channels.reshape(-1, size))
        self.bounds.clear()
