"""The strong view: RandAugment as integer tensor operations equal to PIL's, then cutout (appendix C.2)."""

from mpl_scale.augment import affine, colour, histogram
from mpl_scale.augment.registry import OPS, Operation, find_ops, register_op
from mpl_scale.augment.strong import StrongView

__all__ = ["OPS", "Operation", "StrongView", "affine", "colour", "find_ops", "histogram", "register_op"]
