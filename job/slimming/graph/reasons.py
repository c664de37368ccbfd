"""Reasons why channels are not cut, each with its remedy: the change of the code that frees them.

A rule, the grouping or a trial cut gives a reason of this table, e.g. ``MIXES(op.name)``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_CHANGE = ""  # the remedy where no change of the code would free the channels
IN_TRAIN_MODE = " (in train mode)"


@dataclass(frozen=True)
class Reason:
    """Text of why channels are not cut, and the change of the code that would free them."""

    text: str
    remedy: str

    def in_train_mode(self) -> Reason:
        """Return the reason of an op that only train mode runs."""
        return Reason(self.text + IN_TRAIN_MODE, self.remedy)


@dataclass(frozen=True)
class ReasonKind:
    """Kind of reason: a text and a remedy, in which ``{}`` is the name of an op or a layer.

    ``remedies`` are those of some names.
    """

    text: str
    remedy: str
    remedies: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, name: str = "") -> Reason:
        """Return the reason for ``name``, which is empty for a text without a name."""
        text, remedy = self.text, self.remedies.get(name, self.remedy)
        return Reason(text.replace("{}", name), remedy.replace("{}", name))

    def match(self, text: str) -> Reason | None:
        """Return the reason of this kind with this ``text``; None if it is of another kind."""
        pattern = "(.+)".join(map(re.escape, self.text.split("{}")))
        found = re.fullmatch(pattern, text.removesuffix(IN_TRAIN_MODE))
        if not found:
            return None
        reason = self(*found.groups())
        return reason.in_train_mode() if text.endswith(IN_TRAIN_MODE) else reason


def _all(names: str, remedy: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), remedy)


_ATTRIBUTE = "an attribute of the module, e.g. self.channels, which the cut rewrites"
_BUFFER = (
    "register the indices as a one-dimensional buffer of integers, none of them negative, which "
    "the cut rewrites"
)
_PARAMETER = "store it as the weight of a layer, and compute nothing from it in the forward pass"
_ONE_AXIS = "reshape them so that all channels are along one axis, e.g. (B, C, H, W)"
_CUT_BOTH = (
    "compute both sides with layers of the network, or with parameters of the same size: nothing "
    "can be removed from a constant, an input or an output"
)
_ADD_RULE = (
    "compute it with layers of torch.nn and ops that have a rule, or add one (see Extending it in "
    "job/slimming/README.md)"
)
_OWN_CONVOLUTION = "give each part a convolution of its own in place of a split of one stream"
_OTHER_AXIS = _all("softmax log_softmax softmin cumsum cumprod", "apply it along another axis")
_ONLY_FOR = "works only for the current number of channels"

# the number of channels is written in the code
OP_COUNT = ReasonKind(
    f"{{}} {_ONLY_FOR}",
    f"take the number of channels from x.shape or from {_ATTRIBUTE}",
    {
        **_all(
            "view reshape unflatten",
            "write x.flatten(1) in place of x.view(-1, 512), a size of -1 for the channels, or "
            f"take the number from x.shape or from {_ATTRIBUTE}",
        ),
        **_all(
            "split split_with_sizes chunk tensor_split narrow",
            f"take the sizes of the parts from x.shape or from {_ATTRIBUTE}: "
            "x.split((self.first, self.rest), 1)",
        ),
        "__getitem__": f"take the bounds of slices from x.shape or from {_ATTRIBUTE}; {_BUFFER}",
        "index_select": _BUFFER,
        "pad": f"take the sizes from x.shape or from {_ATTRIBUTE}",
    },
)
PARAMETER_COUNT = ReasonKind(
    f"the parameter {{}} {_ONLY_FOR}", "use {} on the same channels at each of its uses"
)
CODE_COUNT = ReasonKind(
    f"code that reads their number {_ONLY_FOR}",
    "compute with x.shape where it is needed, and do not compare it with a constant",
)
UNKNOWN_COUNT = ReasonKind(f"an op that is not supported {_ONLY_FOR}", _ADD_RULE)

# parts of equal size
OVERLAP = ReasonKind("parts that must stay equally large overlap", _OWN_CONVOLUTION)
FIXED_PARTS = ReasonKind("parts that must stay equally large have fixed channels", _OWN_CONVOLUTION)
FIXED_HEADS = ReasonKind(
    "heads that must stay as wide as channels that are never cut",
    "take the widths of the attention's views from attributes of its own or from -1, not from the "
    "width of the stream, e.g. x.flatten(2) after the attention",
)
OVERLAPPING_HEADS = ReasonKind(
    "heads that must stay equally wide overlap",
    "split the channels into heads by views of the same sizes at each of their uses",
)
UNEQUAL_SLICES = ReasonKind("its slices have no common size", _OWN_CONVOLUTION)
UNBALANCED = ReasonKind("only some of them must stay equally many in equal parts", _OWN_CONVOLUTION)
TWO_AXES = ReasonKind("two axes of {}", "use one parameter for each axis of {}")
ALL_TOGETHER = ReasonKind(
    "all of its channels must be cut together", "compute each channel from its own row of a weight"
)

# weights and parameters
COMPUTED_BY = ReasonKind(
    "a weight that is computed by {}",
    "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') before the cut",
    {
        **_all("weight_norm spectral_norm", "call torch.nn.utils.remove_{}(layer) before the cut"),
        "a pruning mask": "call torch.nn.utils.prune.remove(layer, 'weight') before the cut",
    },
)
COMPUTED_OR_SHARED = ReasonKind("its weight is computed from others, or shared", _PARAMETER)
NOT_USED = ReasonKind(
    "no pass in eval mode uses it",
    "remove the layer, whose channels count for a target in channels, or pass an example that "
    "uses it",
)
COMPUTED_WEIGHT_OR_MIXED = ReasonKind("{} with a computed weight or mixed channels", _PARAMETER)
COMPUTED_OR_MIXED = ReasonKind("{} with computed parameters or mixed channels", _PARAMETER)
SEVERAL_OR_COMPUTED = ReasonKind(
    "{} over several axes or mixed channels, or with computed parameters", _PARAMETER
)
COMPUTED_WEIGHT = ReasonKind("{} with a computed weight", _PARAMETER)
COMPUTED_BIAS = ReasonKind("{} with a computed bias", _PARAMETER)
CONSTANT = ReasonKind("a constant that is not a parameter", _PARAMETER)
BUFFER = ReasonKind("{} with a buffer is not supported", "make the buffer a parameter")
OTHER_USE = ReasonKind("{} uses its weight too", "give {} a parameter of its own")
UNKNOWN_LAYER = ReasonKind(
    "layers of the kind {} are not supported",
    "compute it with layers of torch.nn, or add a rule for {} (job/slimming/README.md)",
)

# channels and values that no layer of the network makes
NEVER_CUT = ReasonKind("{} with channels that are never cut", _CUT_BOTH)
ADDED_TO_FIXED = ReasonKind("added to channels that are never cut", _CUT_BOTH)
FIXED_QUERIES = ReasonKind("{} of queries or keys that are never cut", _CUT_BOTH)
FIXED_INPUTS = ReasonKind("{} of inputs that are never cut", _CUT_BOTH)
UNKNOWN_ORIGIN = ReasonKind(
    "{} of a tensor of unknown origin",
    "make it by ops of torch, not by NumPy or a kernel of its own; a constant by torch.tensor, or "
    "as a buffer",
)
ONE_WITH_SEVERAL = ReasonKind(
    "{} of one channel with several",
    "expand the one channel with a layer, e.g. a 1x1 convolution",
)

NUMBER_OF_HEADS = ReasonKind(
    "{} of the weights of heads whose number stays",
    "give the width of a head in place of their number, as in view(B, N, -1, 64)",
)

# several axes, and ops across channels
PACKED_OR_MIXED = ReasonKind("{} of packed sequences or mixed channels", _ONE_AXIS)
MIXED = ReasonKind("{} of mixed channels", _ONE_AXIS)
MIXES = ReasonKind("{} that mixes channels", _ONE_AXIS)
DIFFERENT_AXES = ReasonKind("{} of channels along different axes", _ONE_AXIS)
SEVERAL_AXES = ReasonKind("{} of channels along several axes", _ONE_AXIS)
DIFFERENT_CHANNELS = ReasonKind("cat of different channels", _ONE_AXIS)
ACROSS_CHANNELS = ReasonKind("{} across channels is not supported", _ADD_RULE, _OTHER_AXIS)
ALL_AXES = ReasonKind("{} over all axes is not supported", "name the axes, e.g. x.mean((2, 3))")
SLICE_ASSIGNMENT = ReasonKind(
    "assignment to a slice is not supported", "concatenate the parts: torch.cat((first, rest), 1)"
)
SCALE = ReasonKind(
    "the scale of attention depends on the number of channels, and what is before it is not linear",
    "keep the scale in an attribute and pass it, e.g. scale=self.scale",
)
COMPUTED_MASK = ReasonKind(
    "{} with a mask that is computed from channels",
    "compute the mask from channels that are not cut",
)
OTHER_HEADS = ReasonKind(
    "{} of other heads", "use as many heads for keys and values as for queries"
)
OVER_VALUES = ReasonKind(
    "{} over channels of values", "use as many heads for keys and values as for queries"
)
COMPUTED_PLACES = ReasonKind(
    "{} at places that are computed from channels to cut",
    "compute the places from channels that are not cut",
)

# no change is needed, or none would help
OUTPUT = ReasonKind("the network's output", NO_CHANGE)
NO_CHANNELS_OF_ITS_OWN = ReasonKind(
    "neither its inputs nor its outputs are channels that can be cut", NO_CHANGE
)
HIDDEN = ReasonKind("hidden states of recurrent layers are not cut", NO_CHANGE)
SELECTION = ReasonKind("channels are selected before each BatchNorm that reads them", NO_CHANGE)
UNRANKED = ReasonKind("no importance ranks them", NO_CHANGE)
ASKED = ReasonKind("asked to be ignored", "leave it out of ignore")
TRAIN_MODE_FAILS = ReasonKind(
    "{} reads some of them in train mode, which fails",
    "pass an example for which train mode runs",
)

# ops without a rule
REARRANGED = ReasonKind("rearranged in a way that is not supported", _ADD_RULE)
SEVERAL_INPUTS = ReasonKind("{} of several activations is not supported", _ADD_RULE)
NO_CHANNELS = ReasonKind("{} with a result without channels is not supported", _ADD_RULE)
NOT_SUPPORTED_HERE = ReasonKind("{} is not supported here", _ADD_RULE)
NOT_SUPPORTED = ReasonKind(
    "{} is not supported",
    _ADD_RULE,
    {
        "einsum": "write the product as a matmul, or as an equation of batched matrices: "
        "bnc,bmc->bnm"
    },
)
FAULT = ReasonKind(
    "an error of Gammaslim in {}", "report it as a defect, with the line of code that is named here"
)

KINDS = tuple(value for value in globals().values() if isinstance(value, ReasonKind))


def read_reason(text: str) -> Reason:
    """Return the reason with the ``text`` that a file of a plan has.

    It has no remedy if it is of a kind that this version does not give. Of two kinds that match,
    e.g. a name with a space, the one with the longer text counts.
    """
    by_length = sorted(KINDS, key=lambda kind: len(kind.text), reverse=True)
    found = (reason for kind in by_length if (reason := kind.match(text)))
    return next(found, Reason(text, NO_CHANGE))


def explain(reason: str, place: str, remedy: str) -> str:
    """Return a reason with the line of code and the change that would free the channels."""
    where = f"{reason} ({place})" if place else reason
    return f"{where}; to cut them: {remedy}" if remedy else where
