"""Remedies: the change of a network's code that would free channels that are not cut.

``REMEDIES`` has one entry for each kind of reason that a rule, the grouping or a trial cut gives.
"""

from __future__ import annotations

import re

ATTRIBUTE = "an attribute of the module, e.g. self.channels, which the cut rewrites"
PARAMETER = "store it as the weight of a layer, and compute nothing from it in the forward pass"
ONE_AXIS = "reshape them so that all channels are along one axis, e.g. (B, C, H, W)"
CUT_BOTH = "compute both sides with layers of the network, or with parameters of the same size"

# by a pattern of the reason, whose first match counts; \1 is what its group matched
REMEDIES: tuple[tuple[str, str], ...] = (
    # the number of channels is written in the code
    (
        r"(view|reshape|unflatten) works only for",
        r"write x.flatten(1) in place of x.view(-1, 512), a size of -1 for the channels, or take "
        rf"the number from x.shape or from {ATTRIBUTE}",
    ),
    (
        r"(split|split_with_sizes|chunk|tensor_split|narrow|__getitem__) works only for",
        rf"take the sizes of the parts from x.shape or from {ATTRIBUTE}: "
        "x.split((self.first, self.rest), 1)",
    ),
    (
        r"(index_select|gather) works only for",
        "register the indices as a buffer of integers, which the cut rewrites",
    ),
    (r"pad works only for", f"take the sizes from x.shape or from {ATTRIBUTE}"),
    (
        r"code that reads their number works only for",
        "compute with x.shape where it is needed, and compare it with no number",
    ),
    (r"the parameter (\S+) works only for", r"use \1 on the same channels at each of its uses"),
    (r"\S+ works only for", f"take the number of channels from x.shape or from {ATTRIBUTE}"),
    # parts of equal size
    (
        r"parts that must stay equally large|its slices have no common size|only some of them must "
        r"stay equally many",
        "give each part a convolution of its own in place of a split of one stream",
    ),
    (r"two axes of (\S+)", r"use one parameter for each axis of \1"),
    (r"all of its channels must be cut together", "give each channel a row of its own to produce"),
    # weights and parameters
    (
        r"a weight that is computed by (weight_norm|spectral_norm)",
        r"call torch.nn.utils.remove_\1(layer) before the cut",
    ),
    (
        r"a weight that is computed by a pruning mask",
        "call torch.nn.utils.prune.remove(layer, 'weight') before the cut",
    ),
    (
        r"a weight that is computed by",
        "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') before the cut",
    ),
    (r"its weight is computed from others", PARAMETER),
    (r".*(computed (weight|bias|parameters)|a constant that is not a parameter)", PARAMETER),
    (r".*with a buffer is not supported", "make the buffer a parameter"),
    (r"(.*) uses its weight too", r"give \1 a parameter of its own"),
    (
        r"layers of the kind (\S+) are not supported",
        r"compute it with layers of torch.nn, or add a rule for \1 (job/slimming/README.md)",
    ),
    # channels and values that no layer of the network makes
    (
        r".*(never cut|tensor of unknown origin)",
        f"{CUT_BOTH}: nothing can be removed from a constant, an input or an output",
    ),
    (
        r".*of one channel with several",
        "expand the one channel with a layer, e.g. a 1x1 convolution",
    ),
    # several axes, and ops across channels
    (r".*(mixed channels|mixes channels|different axes|several axes)", ONE_AXIS),
    (r"cat of different channels", ONE_AXIS),
    (
        r"(softmax|log_softmax|softmin|cumsum|cumprod) across channels",
        "apply it along another axis",
    ),
    (r"\S+ over all axes", "name the axes, e.g. x.mean((2, 3))"),
    (r"assignment to a slice", "concatenate the parts: torch.cat((first, rest), 1)"),
    (
        r"the scale of attention",
        "keep the scale in an attribute and pass it, e.g. scale=self.scale",
    ),
    (r".*mask that is computed", "compute the mask from channels that are not cut"),
    (
        r".*other heads|.*channels of values",
        "use as many heads for keys and values",
    ),
    (r".*packed sequences", "pass a padded tensor (B, L, C)"),
    (r".*separate weights", "use the same embed_dim for queries, keys and values"),
    (r".*places that are computed", "compute the places from channels that are not cut"),
    # no change is needed, or none would help
    (r"the network's output", ""),
    (r"channels are selected before", ""),
    (r"asked to be ignored", "leave it out of ignore"),
    (r".*reads some of them in train mode", "pass an example for which train mode runs"),
    # ops without a rule
    (
        r"(einsum)\b.*not supported",
        "write the product as a matmul, or as an equation of batched matrices: bnc,bmc->bnm",
    ),
    (
        r"(\S+) .*is not supported|an op that is not supported|(\S+) .*(is not supported|without)",
        "compute it with layers of torch.nn and ops that have a rule, or add one (see Extending it "
        "in job/slimming/README.md)",
    ),
    (
        r"rearranged in a way",
        "write the move of the channels with one split, cat, permute or view",
    ),
)


def remedy_of(reason: str) -> str:
    """Return the change that would free channels that are not cut for ``reason``.

    Empty where no change of the code would, as for the output of the network.
    """
    for pattern, remedy in REMEDIES:
        if match := re.match(pattern, reason):
            return match.expand(remedy)
    return ""


def explain(reason: str, place: str, remedy: str) -> str:
    """Return a reason with the line of code and the change that would free the channels."""
    where = f"{reason} ({place})" if place else reason
    return f"{where}; to cut them: {remedy}" if remedy else where
