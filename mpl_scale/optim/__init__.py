"""Optimisers that never read a device value on the host, and the learning-rate schedules as arrays."""

from mpl_scale.optim.adamw import AdamW
from mpl_scale.optim.groups import layer_scales, parameter_groups
from mpl_scale.optim.lamb import LAMB
from mpl_scale.optim.lars import LARS
from mpl_scale.optim.muon import Muon
from mpl_scale.optim.optimizers import OPTIMIZERS, SGD, RMSpropTF, ShardOptimizer, build_optimizer
from mpl_scale.optim.schedules import schedule

__all__ = [
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SGD",
    "AdamW",
    "Muon",
    "RMSpropTF",
    "ShardOptimizer",
    "build_optimizer",
    "layer_scales",
    "parameter_groups",
    "schedule",
]
