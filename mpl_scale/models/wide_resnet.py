"""WideResNet for 32x32 images (Zagoruyko and Komodakis, 2016), as the paper's released code builds it (3.2).

Pre-activation blocks, leaky ReLU of slope 0.2, dropout before the classifier (a NetworkConfig setting), classifier
initialised from U(-1/sqrt(classes), 1/sqrt(classes)).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from mpl_scale.models.registry import register_model


class _NormAct(nn.BatchNorm2d):
    """Batch norm, then leaky ReLU, as one layer: the two are computed together where kernels are compiled."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__(channels)
        self.act = nn.LeakyReLU(slope, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class _Block(nn.Module):
    """BN, act, conv, BN, act, conv, plus the input (projected from the activated input when the shape changes).

    bare: without the first BN and activation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, slope: float, bare: bool) -> None:
        super().__init__()
        self.bn1 = nn.Identity() if bare else _NormAct(inputs, slope)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = _NormAct(outputs, slope)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.bn1(x)
        residual = x if self.shortcut is None else self.shortcut(activated)
        y = self.conv1(activated)
        return self.conv2(self.bn2(y)).add_(residual)


class WideResNet(nn.Module):
    """Three groups of (depth - 4) / 6 blocks, widths 16, 32, 64 times `widen`, at strides 1, 2, 2.

    bare_transitions: the blocks that halve the size have no first BN and activation, as in kekmodel's port, which
    computes and drops them.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        depth: int = 28,
        widen: int = 2,
        stem: int = 32,
        slope: float = 0.2,
        bare_transitions: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"WideResNet depth = {depth}: must be 6 n + 4, as 28 or 40")
        self.stem = nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)
        blocks, inputs = [], stem
        for group, base in enumerate((16, 32, 64)):
            for index in range((depth - 4) // 6):
                stride = 2 if group and not index else 1
                bare = bare_transitions and stride == 2
                blocks.append(_Block(inputs, base * widen, stride, slope=slope, bare=bare))
                inputs = base * widen
        self.blocks = nn.Sequential(*blocks)
        self.bn = _NormAct(inputs, slope)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(inputs, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        bound = 1 / math.sqrt(num_classes)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.classifier(self.pool(self.bn(self.blocks(self.stem(x)))))


@register_model("wide_resnet28_2")
def wide_resnet28_2(
    *, num_classes: int, stem: int = 32, slope: float = 0.2, bare_transitions: bool = False, in_chans: int = 3
) -> WideResNet:
    """WideResNet-28-2, 1.5M parameters: the paper's network for CIFAR-10-4K and SVHN-1K."""
    return WideResNet(
        num_classes=num_classes, stem=stem, slope=slope, bare_transitions=bare_transitions, in_chans=in_chans
    )
