"""Philox4x32-10, the one source of randomness: a pure function of (key, counter), for numpy and torch alike.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Data order, crop windows, augmentation
parameters, sampled pseudo labels, dropout and drop-path all draw from it, keyed by what they are for. Nothing is
carried from step to step, so a resumed run, a recomputed block and any number of ranks draw the same numbers.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Words = TypeVar("Words", np.ndarray, torch.Tensor)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[int, int | Words]
) -> tuple[Words, Words, Words, Words]:
    """Four 32-bit random words for each counter.

    Args:
        counter: four broadcastable int64 arrays or tensors, each value in [0, 2**32).
        key: two 32-bit integers; the second may be an array or tensor.

    Returns:
        Four int64 arrays or tensors of the broadcast shape, values uniform over [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 32x32-bit product overflows a signed 64-bit integer; its bits are right, and the mask drops the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(
    *, seed: int, stream: int | torch.Tensor, step: torch.Tensor, rows: torch.Tensor, columns: int
) -> torch.Tensor:
    """Uniform numbers in (0, 1) on the device, a function of (seed, stream, step, row, column) alone.

    Args:
        seed: the run's seed, 32 bits are used.
        stream: what the numbers are for (a dropout site, label sampling, ...), 32 bits; or several, int64 [S].
        step: int64 [], the step counter; read on the device, never on the host.
        rows: int64 [B], global row numbers, so that every layout of ranks draws the same numbers for a row.
        columns: numbers per row.

    Returns:
        float32 [B, columns], or [S, B, columns].
    """
    blocks = torch.arange(-(-columns // 4), device=rows.device)[None, :]
    streams = stream[:, None, None] if isinstance(stream, torch.Tensor) else stream
    words = philox4x32(
        (blocks, rows[:, None] & _MASK, (step & _MASK).expand(1, 1), (step >> 32).expand(1, 1)),
        (seed & _MASK, streams & _MASK),
    )
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :columns]
    return _to_unit(bits >> 8).to(torch.float32)


def uniform_numpy(*, seed: int, stream: int, epoch: np.ndarray, ids: np.ndarray, columns: int) -> np.ndarray:
    """As `uniform`, on the host, for the data pipeline: float64 [B, columns] in (0, 1).

    Args:
        seed: the run's seed.
        stream: what the numbers are for.
        epoch: int64 [B], the epoch each sample is drawn in.
        ids: int64 [B], sample ids (up to 2**64).
        columns: numbers per sample.
    """
    blocks = np.arange(-(-columns // 4), dtype=np.int64)[None, :]
    low, high = ids[:, None] & _MASK, (ids[:, None] >> 32) & _MASK
    with np.errstate(over="ignore"):
        words = philox4x32((blocks, low, epoch[:, None] & _MASK, high), (seed & _MASK, stream & _MASK))
    bits = np.stack(np.broadcast_arrays(*words), axis=-1).reshape(len(ids), 4 * blocks.size)[:, :columns]
    return _to_unit(bits >> 8)


def _to_unit(bits24: Words) -> Words:
    """24-bit integers to the midpoints of 2**24 equal cells: never 0, never 1, exact in float32 below 1/2."""
    return (bits24 + 0.5) / (1 << 24)
