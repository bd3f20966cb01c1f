"""The strong view (appendix C.2): RandAugment as integer tensor operations equal to PIL's, then cutout."""

from mpl_scale.augment import affine, colour, cutout, histogram
from mpl_scale.augment.registry import OP_SETS, OPS, Given, Operation, find_ops, register_op
from mpl_scale.augment.strong import StrongView

__all__ = [
    "OPS",
    "OP_SETS",
    "Given",
    "Operation",
    "StrongView",
    "affine",
    "colour",
    "cutout",
    "find_ops",
    "histogram",
    "register_op",
]
