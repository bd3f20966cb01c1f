"""EfficientNet-B6-Wide (section 4): EfficientNet-B6 with its width factor raised from 1.8 to 5.0, depth 2.6 kept.

timm's builder and rounding of channels, the same as the TensorFlow code's. 316.6 million parameters with 1,000 classes;
the paper prints 390 million, which no rounding of these two factors gives.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mpl_scale.models.registry import register_model

WIDTH, DEPTH = 5.0, 2.6
_BN_EPS = 1e-3  # of the TensorFlow models; the config's bn_eps replaces it


@register_model("efficientnet_b6_wide")
def efficientnet_b6_wide(
    *, num_classes: int, drop_path_rate: float = 0.0, in_chans: int = 3, **kwargs: Any
) -> nn.Module:
    """EfficientNet-B6-Wide with TensorFlow's SAME padding.

    Args:
        num_classes: outputs.
        drop_path_rate: stochastic depth of the deepest block; the network section's drop_path sets it.
        in_chans: channels of the images.
        kwargs: of timm's EfficientNet.
    """
    from timm.models import efficientnet  # seconds, and only needed for its models

    return efficientnet._gen_efficientnet(
        "tf_efficientnet_b6",
        channel_multiplier=WIDTH,
        depth_multiplier=DEPTH,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        in_chans=in_chans,
        bn_eps=_BN_EPS,
        pad_type="same",
        **kwargs,
    )
