"""EfficientNet-B6-Wide by its shapes: built without memory."""

from __future__ import annotations

import timm
import torch
from timm.layers import DropPath
from torch import nn

from mpl_scale.config.schema import ModelConfig, NetworkConfig
from mpl_scale.models import build_model
from mpl_scale.models.efficientnet_wide import efficientnet_b6_wide
from mpl_scale.models.layers import DropPath as OurDropPath


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_count_and_depth() -> None:
    """316.6 million at width 5.0 and depth 2.6; the paper prints 390 million."""
    with torch.device("meta"):
        wide = efficientnet_b6_wide(num_classes=1000)
        narrow = timm.create_model("tf_efficientnet_b6", num_classes=1000)
    assert parameters(wide) == 316_649_180
    assert set(wide.state_dict()) == set(narrow.state_dict()), "B6's depth"
    assert wide.num_features == round(5.0 * 1280)
    assert wide.conv_stem.out_channels == round(5.0 * 32)
    # B0's channels of each stage, times 5
    assert [stage[-1].bn3.num_features if hasattr(stage[-1], "bn3") else 80 for stage in wide.blocks] == [
        5 * channels for channels in (16, 24, 40, 80, 112, 192, 320)
    ]


def test_forward_shape_and_stochastic_depth() -> None:
    with torch.device("meta"):
        model = efficientnet_b6_wide(num_classes=7, drop_path_rate=0.2)
        logits = model(torch.empty(2, 3, 64, 48))
    assert logits.shape == (2, 7)
    rates = [layer.drop_prob for layer in model.modules() if isinstance(layer, DropPath)]
    assert rates == sorted(rates)
    assert 0.19 < rates[-1] < 0.2


def test_the_config_names_it_and_sets_its_stochastic_depth() -> None:
    network = NetworkConfig(name="efficientnet_b6_wide", drop_path=0.3, dropout=0.5)
    shared = ModelConfig(teacher=network, student=network, num_classes=1000, image_size=512)
    model = build_model(network, shared, field="mpl_scale.model.student", seed=0, device="meta")
    assert parameters(model) == 316_649_180
    rates = [layer.p for layer in model.modules() if isinstance(layer, OurDropPath)]
    assert 0.29 < max(rates) < 0.3
