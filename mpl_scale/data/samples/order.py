"""The order of samples in an epoch: a keyed permutation evaluated at any index, with nothing in memory.

A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, method 3)
permutes Z_a x Z_b with a*b just above `size`; an index that lands outside [0, size) walks on along its cycle, which
comes back inside because it started there. The round function is Philox.
"""

from __future__ import annotations

import math

import numpy as np

from mpl_scale.philox import philox4x32

_ROUNDS = 8
_MASK = 0xFFFFFFFF


def shuffled(index: np.ndarray, *, size: int, seed: int, epoch: np.ndarray | int, stream: int = 0) -> np.ndarray:
    """Where a keyed permutation of [0, size) sends each index; int64 of index's shape.

    Args:
        index: int64 [K], each in [0, size).
        size: number of samples, at least 1.
        seed: 32 bits are used.
        epoch: one, or int64 [K]; each epoch has its own permutation.
        stream: each stream has its own permutations.
    """
    if size < 1 or np.any((index < 0) | (index >= size)):
        raise ValueError(f"index must lie in [0, size) with size = {size}")
    epoch = np.broadcast_to(np.asarray(epoch, np.int64), index.shape)
    key = (seed & _MASK, stream & _MASK)
    value = _permute(index, size=size, key=key, epoch=epoch)
    outside = np.flatnonzero(value >= size)
    while len(outside):
        value[outside] = _permute(value[outside], size=size, key=key, epoch=epoch[outside])
        outside = outside[value[outside] >= size]
    return value


def _permute(value: np.ndarray, *, size: int, key: tuple[int, int], epoch: np.ndarray) -> np.ndarray:
    """One pass of the network over [0, a*b), the smallest near-square domain that holds [0, size)."""
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    high, low = np.divmod(value, a)
    for turn in range(_ROUNDS):
        if turn % 2 == 0:
            low = (low + _round(high, turn=turn, key=key, epoch=epoch)) % a
        else:
            high = (high + _round(low, turn=turn, key=key, epoch=epoch)) % b
    return high * a + low


def _round(half: np.ndarray, *, turn: int, key: tuple[int, int], epoch: np.ndarray) -> np.ndarray:
    """62 random bits of the half: the sum with a half cannot overflow, and the bias of the modulo is negligible."""
    with np.errstate(over="ignore"):
        words = philox4x32((half & _MASK, np.full_like(half, turn), epoch & _MASK, epoch >> 32), key)
    return (words[0] << 30) | (words[1] >> 2)
