"""Networks by name, with batch norm, dropout and drop-path that agree over ranks."""

from mpl_scale.models import efficientnet_wide, small, wide_resnet
from mpl_scale.models.build import build_model
from mpl_scale.models.passes import Pass, Passes
from mpl_scale.models.registry import MODELS, register_model

__all__ = ["MODELS", "Pass", "Passes", "build_model", "efficientnet_wide", "register_model", "small", "wide_resnet"]
