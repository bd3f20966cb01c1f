"""Policies found by search (`mpl_scale.data.strong.policy`): tables of sub-policies, one drawn for each image.

autoaugment is AutoAugment's for ImageNet (Cubuk et al. 2019, Table 9), with which the paper checked its UDA (C.4,
68.77). Levels count to 10, as in timm's `auto_augment_policy_original`; operations without a magnitude have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpl_scale.config.names import Registry

LEVELS = 10


@dataclass(frozen=True)
class Policy:
    """A table of S sub-policies of N operations each, in order.

    Attributes:
        ops: names of the operations that occur, each once.
        which: int64 [S, N], positions in ops.
        probability: float64 [S, N], of applying each.
        strength: float64 [S, N], level / 10; 0 where the operation has no magnitude.
    """

    ops: tuple[str, ...]
    which: np.ndarray
    probability: np.ndarray
    strength: np.ndarray

    def drawn(self, uniform: np.ndarray) -> np.ndarray:
        """Sub-policies, all equally likely, int64 [U], for numbers float64 [U] in (0, 1)."""
        return (uniform * len(self.which)).astype(np.int64)


def policy_of(table: Sequence[Sequence[tuple[str, float, int]]]) -> Policy:
    """A policy of sub-policies of (operation, probability, level)."""
    ops = tuple(sorted({name for steps in table for name, _, _ in steps}))
    return Policy(
        ops,
        np.array([[ops.index(name) for name, _, _ in steps] for steps in table], np.int64),
        np.array([[probability for _, probability, _ in steps] for steps in table]),
        np.array([[level / LEVELS for _, _, level in steps] for steps in table]),
    )


POLICIES: Registry[Policy] = Registry("augmentation policy")
POLICIES["autoaugment"] = policy_of(
    (
        (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
        (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
        (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
        (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
        (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
        (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
        (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
        (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
        (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
        (("rotate", 0.8, 8), ("color", 0.4, 0)),
        (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
        (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
        (("invert", 0.6, 0), ("equalize", 1.0, 0)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("rotate", 0.8, 8), ("color", 1.0, 2)),
        (("color", 0.8, 8), ("solarize", 0.8, 7)),
        (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
        (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
        (("color", 0.4, 0), ("equalize", 0.6, 0)),
        (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
        (("invert", 0.6, 0), ("equalize", 1.0, 0)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    )
)
