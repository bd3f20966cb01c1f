"""WideResNet for 32x32 images (Zagoruyko and Komodakis, 2016), as the paper's released code builds it (3.2).

Pre-activation blocks, leaky ReLU of slope 0.2, dropout before the classifier (a NetworkConfig setting), classifier
initialised from U(-1/sqrt(classes), 1/sqrt(classes)).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from mpl_scale.models.registry import register_model

SLOPE = 0.2


class _Block(nn.Module):
    """BN, act, conv, BN, act, conv, plus the input (projected from the activated input when the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.leaky_relu(self.bn1(x), SLOPE)
        residual = x if self.shortcut is None else self.shortcut(activated)
        y = self.conv1(activated)
        return residual + self.conv2(F.leaky_relu(self.bn2(y), SLOPE))


class WideResNet(nn.Module):
    """Three groups of (depth - 4) / 6 blocks, widths 16, 32, 64 times `widen`, at strides 1, 2, 2."""

    def __init__(self, *, num_classes: int, depth: int = 28, widen: int = 2, stem: int = 32) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"WideResNet depth = {depth}: must be 6 n + 4, as 28 or 40")
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        blocks, inputs = [], stem
        for group, base in enumerate((16, 32, 64)):
            for index in range((depth - 4) // 6):
                stride = 2 if group and not index else 1
                blocks.append(_Block(inputs, base * widen, stride))
                inputs = base * widen
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(inputs, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        bound = 1 / math.sqrt(num_classes)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 3, H, W] -> logits [B, num_classes]."""
        x = F.leaky_relu(self.bn(self.blocks(self.stem(x))), SLOPE)
        return self.classifier(self.pool(x))


@register_model("wide_resnet28_2")
def wide_resnet28_2(*, num_classes: int, stem: int = 32) -> WideResNet:
    """WideResNet-28-2, 1.5M parameters: the paper's network for CIFAR-10-4K and SVHN-1K."""
    return WideResNet(num_classes=num_classes, depth=28, widen=2, stem=stem)
