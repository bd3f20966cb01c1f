"""Small networks: a CNN for 8x8 digits, the two-moons MLP of section 3.1, the reduced teacher of appendix E."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from mpl_scale.models.registry import register_model


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


@register_model("digits_cnn")
class DigitsCNN(nn.Module):
    """Three 3x3 convolutions with batch norm, then global average pooling and a linear classifier."""

    def __init__(self, *, num_classes: int, widths: tuple[int, ...] = (16, 32, 32), in_chans: int = 3) -> None:
        super().__init__()
        inputs = (in_chans, *widths[:-1])
        strides = (1,) + (2,) * (len(widths) - 1)
        self.features = nn.Sequential(*(_conv(*shape) for shape in zip(inputs, widths, strides, strict=True)))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.classifier(self.pool(self.features(x)))


@register_model("two_moons_mlp")
class TwoMoonsMLP(nn.Module):
    """Two hidden layers of 8 units with sigmoids (3.1); or any vectors' MLP of two hidden layers, of `relu` units."""

    def __init__(self, *, num_classes: int, hidden: int = 8, inputs: int = 2, relu: bool = False) -> None:
        super().__init__()
        unit = nn.ReLU if relu else nn.Sigmoid
        self.features = nn.Sequential(nn.Linear(inputs, hidden), unit(), nn.Linear(hidden, hidden), unit())
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, inputs] -> logits [B, num_classes]."""
        return self.classifier(self.features(x))


@register_model("reduced_teacher")
class ReducedTeacher(nn.Module):
    """The 5-layer perceptron of Reduced MPL (appendix E): 128 hidden units for CIFAR-10 and SVHN, 512 for ImageNet.

    It sees no image but the distribution that a large teacher gave it. Of its `layers` linear layers, the last has no
    ReLU.
    """

    def __init__(self, *, num_classes: int, hidden: int = 128, layers: int = 5) -> None:
        super().__init__()
        widths = [num_classes] + [hidden] * (layers - 1)
        blocks = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(widths)]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, num_classes], distributions -> logits [B, num_classes]."""
        return self.classifier(self.features(x))
