"""Small networks of transformers for peer.py, whose defaults have more layers.

A name is that of the class of the network, without ``ForImageClassification`` if it ends so.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

TOKENS = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 4, 4]}
WINDOWS = {"patch_size": 2, "embed_dim": 24, "depths": [1, 1, 1], "num_heads": [2, 2, 4]}
RESIDUAL = {"embedding_size": 16, "hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 1, 1]}
OPTIONS: dict[str, dict[str, Any]] = {
    "ViT": TOKENS | {"image_size": 64, "patch_size": 16},
    "DeiT": TOKENS | {"image_size": 64, "patch_size": 16},
    "Beit": TOKENS | {"image_size": 64, "patch_size": 16, "use_relative_position_bias": True},
    "ViTMSN": TOKENS | {"image_size": 64, "patch_size": 16},
    "Dinov2": TOKENS | {"image_size": 64, "patch_size": 16},
    "Swin": WINDOWS | {"image_size": 64, "window_size": 4},
    "Swinv2": WINDOWS | {"image_size": 64, "window_size": 4},
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "ResNet": RESIDUAL,
    "RegNet": RESIDUAL | {"groups_width": 16},
    "MobileNetV1": {"image_size": 64},
    "MobileNetV2": {"image_size": 64},
    "MobileViT": {"image_size": 64},
    "MobileViTV2": {"image_size": 64},
    "Pvt": PYRAMID | {"image_size": 64},
    "PvtV2": PYRAMID | {"image_size": 64},
    "PoolFormer": STAGES,
    "SegformerForSemanticSegmentation": PYRAMID | {"decoder_hidden_size": 32},
    "GLPNForDepthEstimation": PYRAMID | {"decoder_hidden_size": 32},
    "FocalNet": {"image_size": 64, "embed_dim": 24, "depths": [1, 1, 1, 1]},
    "Levit": {"image_size": 64},
    "Hiera": {
        "image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4],
    },
    "SwiftFormer": {"image_size": 64},
    "TextNet": {},
    "HGNetV2": {},
}  # fmt: skip


def transformers_network(name: str, classes: int) -> nn.Module:
    """Build the network ``name`` with random weights."""
    import transformers

    kind = name if re.search("For[A-Z]", name) else f"{name}ForImageClassification"
    config = getattr(transformers, f"{kind.rpartition('For')[0]}Config")
    network: nn.Module = getattr(transformers, kind)(config(num_labels=classes, **OPTIONS[name]))
    return network
