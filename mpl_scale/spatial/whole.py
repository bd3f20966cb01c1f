"""Split layers that look at the whole image: global pools, squeeze-excite, group norm; and those that never do."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from mpl_scale.models.layers import Dropout
from mpl_scale.spatial.halo import global_mean, sum_over, wide_dtype
from mpl_scale.spatial.layout import Bounds, Share, slices
from mpl_scale.spatial.rules import Split, SplitLayer, columnwise, partition_rule

columnwise(
    "mpl_scale.models.batch_norm.BatchNorm",  # its statistics span the ranks already, weighted by element count
    "mpl_scale.models.layers.DropPath",
    "torch.nn.modules.linear.Identity",
    *(
        f"torch.nn.modules.activation.{name}"
        for name in (
            "ReLU",
            "ReLU6",
            "LeakyReLU",
            "PReLU",
            "SiLU",
            "GELU",
            "ELU",
            "Mish",
            "Sigmoid",
            "Tanh",
            "Softplus",
        )
    ),
    *(f"torch.nn.modules.activation.{name}" for name in ("Hardswish", "Hardsigmoid", "Hardtanh")),
    *(
        f"timm.layers.activations.{name}"
        for name in ("Swish", "Mish", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "HardMish", "PReLU", "GELU")
    ),
    *(f"timm.layers.activations.{name}" for name in ("GELUTanh", "QuickGELU")),
    *(f"timm.layers.activations_me.{name}Me" for name in ("Swish", "Mish", "HardSwish", "HardSigmoid", "HardMish")),
    "timm.layers.norm.LayerNorm2d",  # over the channels of one pixel
    "timm.layers.norm.LayerNorm2dFp32",
    "timm.layers.norm_act.LayerNormAct2d",
    "timm.layers.norm_act.LayerNormAct2dFp32",
    "timm.layers.layer_scale.LayerScale2d",
)


@partition_rule("mpl_scale.models.layers.Dropout")
class SplitDropout(SplitLayer, Dropout):
    """Element dropout: draws the mask of the whole width, as the unsplit layer does, and uses its own columns."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        return Split(inputs, inputs)

    @classmethod
    def needed(cls, module: Any, split: Split) -> bool:
        return module.p > 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> the same shape."""
        if not self.active:
            return x
        whole = (*x.shape[1:3], self.split.columns)
        noise = self.passes.uniform(self.site, whole[0] * whole[1] * whole[2]).view(-1, *whole)
        keep = noise[..., slice(*slices(self.split.inputs)[self.ranks.rank])] >= self.p
        return x * (keep.to(x.dtype) / (1.0 - self.p))


@partition_rule(
    "torch.nn.modules.pooling.AdaptiveMaxPool2d",
    "timm.layers.adaptive_avgmax_pool.AdaptiveAvgMaxPool2d",
    "timm.layers.adaptive_avgmax_pool.AdaptiveCatAvgMaxPool2d",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveMaxPool",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgMaxPool",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveCatAvgMaxPool",
)
class SplitByGather(SplitLayer):
    """Any last spatial layer: every rank gathers the whole width and runs the layer unchanged."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        if getattr(module, "dim", (2, 3)) not in ((2, 3), [2, 3]):
            raise ValueError(f"it pools dims {module.dim}, only NCHW inputs have a partition rule")
        return Split(inputs, None, (Share(0, inputs[-1]),) * (len(inputs) - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> the layer's output for the whole width, on every rank."""
        forward: Any = self.plain.forward
        return forward(self, self.read(x))


@partition_rule("torch.nn.modules.pooling.AdaptiveAvgPool2d", "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool")
class SplitGlobalAvgPool(SplitByGather):
    """To one pixel: a sum over ranks of B x C numbers. To more: as every other adaptive pool."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        split = super().plan(module, inputs)
        return Split(inputs, None) if getattr(module, "output_size", 1) in (1, (1, 1)) else split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> [B, C, 1, 1] (or [B, C] where the layer flattens), equal on every rank."""
        if self.split.reads is not None:
            return super().forward(x)
        y = global_mean(x, columns=self.split.columns, ranks=self.ranks)
        return y.flatten(1) if getattr(self, "flatten", False) else y


class _Gate(SplitLayer):
    """A block that scales its input by a function of the input's global mean."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        if getattr(module, "add_maxpool", False):
            raise ValueError("add_maxpool = True has no partition rule")
        return Split(inputs, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> the same shape."""
        return x * self.gate_of(global_mean(x, columns=self.split.columns, ranks=self.ranks))

    @abstractmethod
    def gate_of(self, mean: torch.Tensor) -> torch.Tensor:
        """The gate [B, C, 1, 1] of the mean [B, C, 1, 1]."""


@partition_rule("timm.models._efficientnet_blocks.SqueezeExcite")
class SplitSqueezeExcite(_Gate):
    """Rule for squeeze-excite of the EfficientNet family."""

    def gate_of(self, mean: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        return layer.gate(layer.conv_expand(layer.act1(layer.conv_reduce(mean))))


@partition_rule("timm.layers.squeeze_excite.SEModule")
class SplitSEModule(_Gate):
    """Squeeze-excite of timm's ResNets and RegNets."""

    def gate_of(self, mean: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        return layer.gate(layer.fc2(layer.act(layer.bn(layer.fc1(mean)))))


@partition_rule("timm.layers.squeeze_excite.EffectiveSEModule")
class SplitEffectiveSEModule(_Gate):
    """Rule for a module with one layer."""

    def gate_of(self, mean: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        return layer.gate(layer.fc(mean))


@partition_rule(
    "torch.nn.modules.normalization.GroupNorm",
    "timm.layers.norm.GroupNorm",
    "timm.layers.norm.GroupNorm1",
    "timm.layers.norm_act.GroupNormAct",
    "timm.layers.norm_act.GroupNorm1Act",
)
class SplitGroupNorm(SplitLayer, nn.GroupNorm):
    """Mean, then variance about it, over channels of a group, height and the whole width: two sums over ranks."""

    @classmethod
    def plan(cls, module: Any, inputs: Bounds) -> Split:
        return Split(inputs, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, own] -> the same shape."""
        groups, wide = self.num_groups, x.to(wide_dtype(x.dtype))
        count = x.shape[1] // groups * x.shape[2] * self.split.columns
        grouped = wide.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2] * x.shape[3])
        centred = grouped - sum_over(grouped.sum(2, keepdim=True), self.ranks) / count
        variance = sum_over(centred.square().sum(2, keepdim=True), self.ranks) / count
        y = (centred * torch.rsqrt(variance + self.eps)).view(x.shape)
        if self.weight is not None:
            y = y * self.weight.to(y.dtype).view(-1, 1, 1) + self.bias.to(y.dtype).view(-1, 1, 1)
        y = y.to(x.dtype)
        for name in ("drop", "act"):  # timm's norm-and-activation layers
            y = getattr(self, name)(y) if hasattr(self, name) else y
        return y
