"""Networks of the spatial tests, by name, built as a run builds them; top-level so that ranks can pickle the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.layers as tl
import torch
import torch.distributed as dist
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool, SelectAdaptivePool2d
from timm.layers.norm_act import GroupNorm1Act, GroupNormAct
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models.efficientnet import _gen_efficientnet
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.mesh import build_mesh
from mpl_scale.models import build_model
from mpl_scale.models.layers import convert
from mpl_scale.models.passes import Passes
from mpl_scale.spatial import Differences, compare_partitioned

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "conv_5/2": lambda: nn.Conv2d(8, 8, 5, 2, padding=2, bias=False),
    "conv_valid_4/3": lambda: nn.Conv2d(8, 8, 4, 3),
    "conv_even": lambda: nn.Conv2d(8, 8, (3, 2), (1, 2), padding=(1, 0)),
    "conv_dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "conv_grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "conv_depthwise": lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8),
    "conv_1x1/2": lambda: nn.Conv2d(8, 8, 1, 2),
    "conv_torch_same": lambda: nn.Conv2d(8, 8, 4, padding="same"),
    "conv_overpadded": lambda: nn.Conv2d(8, 8, 1, padding=2),
    "same_3/2": lambda: tl.Conv2dSame(8, 8, 3, 2),
    "same_5/3_dilated": lambda: tl.Conv2dSame(8, 8, 3, 3, dilation=2),
    "same_2/1": lambda: tl.Conv2dSame(8, 8, 2, 1, groups=8),
    "max_pool": lambda: nn.MaxPool2d(3, 2, 1),
    "max_pool_ceil": lambda: nn.MaxPool2d(2, 2, ceil_mode=True),
    "max_pool_same": lambda: MaxPool2dSame(3, 2),
    "avg_pool": lambda: nn.AvgPool2d(2),
    "avg_pool_padded": lambda: nn.AvgPool2d(3, 2, 1),
    "avg_pool_unpadded": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_pool_ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True),
    "avg_pool_same": lambda: AvgPool2dSame(2, 1),
    "blur_pool": lambda: tl.BlurPool2d(8),
    "blur_pool_5_constant": lambda: tl.BlurPool2d(8, filt_size=5, pad_mode="constant"),
    "upsample": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "dropout": lambda: nn.Dropout(0.3),
    "drop_path": lambda: tl.DropPath(0.3),
    "batch_norm": lambda: nn.BatchNorm2d(8),
    "batch_norm_act": lambda: tl.BatchNormAct2d(8),
    "group_norm": lambda: nn.GroupNorm(2, 8),
    "group_norm_timm": lambda: tl.GroupNorm(8, 4),
    "group_norm_1": lambda: tl.GroupNorm1(8),
    "group_norm_act": lambda: GroupNormAct(8, 2),
    "group_norm_1_act": lambda: GroupNorm1Act(8),
    "layer_norm_2d": lambda: tl.LayerNorm2d(8),
    "squeeze_excite": lambda: SqueezeExcite(8),
    "se_module": lambda: SEModule(8, rd_channels=4),
    "se_module_batch_norm": lambda: SEModule(8, rd_channels=4, norm_layer=nn.BatchNorm2d),
    "effective_se": lambda: EffectiveSEModule(8, gate_layer="sigmoid"),
    "global_avg": lambda: nn.AdaptiveAvgPool2d(1),
    "global_avg_fast": lambda: FastAdaptiveAvgPool(),
    "adaptive_avg": lambda: nn.AdaptiveAvgPool2d((2, 3)),
    "adaptive_max": lambda: nn.AdaptiveMaxPool2d(1),
    **{
        f"select_{kind}": (lambda kind=kind: SelectAdaptivePool2d(pool_type=kind))
        for kind in ("avgmax", "catavgmax", "fastmax", "fastavgmax", "fastcatavgmax")
    },
    "inverted_residual": lambda: InvertedResidual(8, 8, 5, exp_ratio=4, pad_type="same", se_layer=SqueezeExcite),
    "inverted_residual/2": lambda: InvertedResidual(8, 8, 3, 2, exp_ratio=4, pad_type="same"),
}
"""Layers of 8 channels, by name; every partition rule is in one of them."""


def layer_network(name: str, group: dist.ProcessGroup | None) -> nn.Module:
    """A convolution, the layer, a wide convolution, a pool and a classifier; two thirds of the values are negative."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    pool = isinstance(layer, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d | SelectAdaptivePool2d | FastAdaptiveAvgPool)
    behind = [nn.Flatten()] if pool else [nn.Conv2d(8, 8, 5, padding=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    front = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer, *behind)
    with torch.no_grad():
        features = front.eval()(torch.zeros(2, 3, 6, 6)).shape[1]
    network = nn.Sequential(*front.train(), nn.Linear(features, 5))
    passes = Passes()
    network.passes = passes
    return convert(network, passes=passes, group=group)


def compare_layer(name: str, width: int, sizes: list[int], **how: Any) -> list[Differences]:
    """On a rank: the differences of a layer's network at every image size, split over `width` ranks and unsplit."""
    mesh = build_mesh(device=torch.device("cpu"), width=width)
    return [
        compare_partitioned(lambda group: layer_network(name, group), mesh=mesh, image_size=size, batch=2, **how)
        for size in sizes
    ]


def build(name: str, group: dist.ProcessGroup | None, **settings: Any) -> nn.Module:
    """A network as a run builds it; `b6_wide_slim`: EfficientNet-B6-Wide's 45 blocks at 1/20 of its channels."""
    if name == "b6_wide_slim":
        torch.manual_seed(0)
        slim = _gen_efficientnet(
            "tf_efficientnet_b6", channel_multiplier=0.25, depth_multiplier=2.6, pad_type="same", num_classes=10,
            drop_path_rate=0.2,
        )  # fmt: skip
        slim.passes = Passes()
        return convert(slim, passes=slim.passes, group=group)
    network = NetworkConfig(name=name, **settings)
    shared = ModelConfig(teacher=network, student=network, num_classes=10, image_size=32)
    return build_model(network, shared, field="mpl_scale.model.student", seed=3, group=group)


def compare(name: str, settings: dict[str, Any], width: int, image_size: int, batch: int, **how: Any) -> Differences:
    """On a rank: the differences between the network split over `width` ranks and unsplit."""
    mesh = build_mesh(device=torch.device("cpu"), width=width)
    return compare_partitioned(
        lambda group: build(name, group, **settings), mesh=mesh, image_size=image_size, batch=batch, **how
    )
