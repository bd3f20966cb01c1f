"""How far each operation goes: from a strength to the argument of PIL's function.

A strength is magnitude / 10 with a random sign; at 1 an operation reaches its limit, a setting of `StrongConfig` whose
default is AutoAugment's (Cubuk et al. 2019, Table 6). Three rules (`magnitude_rule`):

- distance: 0 leaves the image alone and distortion grows with the strength, as a uniformly drawn magnitude needs.
- level: the released code's. Enhancers, posterize and solarize read the magnitude without a sign, from one end of
  their range to the other: 0 is the greyest, the fewest bits, everything inverted. Solarize's threshold is an 8-bit
  number there, so 409 means 153.
- autoaugment: from one end of AutoAugment's ranges to the other, as its policy's levels count: an enhancer from 0.1 to
  1.9, posterize from 4 bits kept to 8, solarize's threshold from 0 to 256.

Magnitudes above 10 go beyond the limits, as in Noisy Student's code: 27 rotates by 81 degrees. Where that would replace
the image, the limit holds: the weight of Sample Pairing's partner, which that code does not have (at 27 it would be 1,
the partner alone), and the lower end of the distance rule's enhancers (factor 0 is a black image).
"""

from __future__ import annotations

import numpy as np

from mpl_scale.config.schema import StrongConfig

_MOST_BITS = 8


def degrees(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """Angle in degrees, counter-clockwise."""
    return limits.rotate * strength


def shear(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """Columns per row, or rows per column."""
    return limits.shear * strength


def columns(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """Shift to the left, whole pixels."""
    return np.round(strength * limits.translate * size[1])


def rows(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """Shift upwards, whole pixels."""
    return np.round(strength * limits.translate * size[0])


def factor(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """PIL's enhancement factor; 1 leaves the image alone. Never below that of strength -1: 0 is one grey or black."""
    if limits.magnitude_rule != "distance":
        return (1 - limits.enhance) + 2 * limits.enhance * np.abs(strength)
    return np.maximum(1 + limits.enhance * np.maximum(strength, -1.0), 0.0)


def bits(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """Bits kept, 1 (PIL's least) to 8."""
    amount = np.floor(limits.posterize * np.abs(strength))
    if limits.magnitude_rule != "level":
        amount = _MOST_BITS - (amount if limits.magnitude_rule == "distance" else limits.posterize - amount)
    return np.clip(amount, 1, _MOST_BITS)


def threshold(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """Least value that is inverted, 0 to 256."""
    amount = np.floor(256 * np.abs(strength))
    if limits.magnitude_rule == "level":
        return amount % 256
    return np.minimum(amount, 256) if limits.magnitude_rule == "autoaugment" else np.maximum(256 - amount, 0)


def share(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """Weight of the partner's pixels, 0 to the limit: at 1 the view would be the partner."""
    return limits.sample_pairing * np.minimum(np.abs(strength), 1.0)


def side(strength: np.ndarray, limits: StrongConfig, size: tuple[int, int]) -> np.ndarray:
    """Side of the square that is filled, an even number of pixels."""
    return 2 * np.floor(limits.cutout_op * min(size) * np.abs(strength))
