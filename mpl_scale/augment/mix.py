"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a labelled batch, with soft targets: the baselines' mixes.

A row is mixed with another row of its block of consecutive global rows, so that a rank finds every partner among its
own rows and the result does not depend on how many ranks there are. All draws are Philox numbers by (seed, stream,
step, global block): the rows of a block share lambda, and CutMix's box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mpl_scale.config.names import Registry
from mpl_scale.philox import uniform_numpy

_ATTEMPTS = 64
_DRAWS_PER_ATTEMPT = 2
_BOX = 2  # row and column of CutMix's centre


@dataclass(frozen=True)
class MixDraws:
    """What is drawn for one rank's rows.

    Attributes:
        partner: int64 [B], the local row mixed into each row.
        weight: float64 [B], lambda: the share of the row itself.
        centre: float64 [B, 2] in (0, 1), row and column of CutMix's box as shares of the sides.
    """

    partner: np.ndarray
    weight: np.ndarray
    centre: np.ndarray


Mix = Callable[[torch.Tensor, torch.Tensor, MixDraws], tuple[torch.Tensor, torch.Tensor]]
"""`(images [B, 3, H, W], targets [B, K], draws) -> (images, targets)`, both new."""
MIXES: Registry[Mix] = Registry("mix")


def beta(alpha: float, uniform: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) numbers in [0, 1] by Jöhnk's rejection: U^(1/a) / (U^(1/a) + V^(1/a)) where the sum is <= 1.

    Args:
        alpha: above 0. A pair is accepted with probability 0.99 at 0.1, 1/2 at 1 and 1/6 at 2.
        uniform: float64 [B, 2 n] in (0, 1): the pairs (U, V) in the order they are tried. In logarithms, because
            U^(1/a) underflows for small a. Rows whose pairs are all rejected (5e-20 at alpha = 1, 1e-5 at 2) take 1/2.
    """
    u, v = np.log(uniform[:, 0::2]) / alpha, np.log(uniform[:, 1::2]) / alpha
    total = np.logaddexp(u, v)
    accepted = total <= 0
    first = accepted.argmax(axis=1)
    rows = np.arange(len(uniform))
    return np.where(accepted.any(axis=1), np.exp(u - total)[rows, first], 0.5)


def draw_mix(
    rows: np.ndarray, *, step: int, seed: int, stream: int, alpha: float, block: int = 2, shift: int = 1
) -> MixDraws:
    """The draws of one rank's rows.

    Args:
        rows: int64 [B], global rows of the step's batch: whole blocks, consecutive.
        step: the step.
        seed: the run's seed.
        stream: what the numbers are for, 32 bits.
        alpha: of Beta(alpha, alpha).
        block: consecutive rows that are mixed among themselves.
        shift: row k of a block is mixed with row (k + shift) mod block; with 2 rows, neighbours are exchanged.

    Raises:
        ValueError: alpha is not positive, the block has one row, or rows that do not make whole blocks.
    """
    if alpha <= 0:
        raise ValueError(f"alpha = {alpha} of the mix's Beta distribution must be above 0; 1 is uniform")
    if block < 2 or not shift % block:
        raise ValueError(f"block = {block} with shift = {shift} mixes rows with themselves; use block >= 2, shift 1")
    if len(rows) % block or (rows[::block] % block).any() or (np.diff(rows.reshape(-1, block), axis=1) != 1).any():
        raise ValueError(
            f"block = {block} does not divide the {len(rows)} rows of each rank (from row {rows[0]} on) into whole "
            "blocks; use a block that divides the batch of every rank, or 2 and an even batch"
        )
    blocks = rows[::block] // block
    columns = _ATTEMPTS * _DRAWS_PER_ATTEMPT + _BOX
    uniform = uniform_numpy(
        seed=seed, stream=stream, epoch=np.full(len(blocks), step, dtype=np.int64), ids=blocks, columns=columns
    )
    weight, centre = beta(alpha, uniform[:, _BOX:]), uniform[:, :_BOX]
    local = np.arange(len(rows)).reshape(-1, block)
    return MixDraws(
        partner=np.roll(local, -shift, axis=1).reshape(-1),
        weight=np.repeat(weight, block),
        centre=np.repeat(centre, block, axis=0),
    )


def soft_targets(labels: torch.Tensor, classes: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One-hot rows: int64 [B] to [B, classes]."""
    return F.one_hot(labels, classes).to(dtype)


@MIXES.register("mixup")
def mixup(images: torch.Tensor, targets: torch.Tensor, draws: MixDraws) -> tuple[torch.Tensor, torch.Tensor]:
    """lambda x + (1 - lambda) x', and the same of the targets. Images are floating point [B, 3, H, W]."""
    return _average(images, draws.weight, draws), _average(targets, draws.weight, draws)


@MIXES.register("cutmix")
def cutmix(images: torch.Tensor, targets: torch.Tensor, draws: MixDraws) -> tuple[torch.Tensor, torch.Tensor]:
    """A box of the partner with sides sqrt(1 - lambda) of the image's, clipped; the targets by the area left.

    Images may be uint8 or floating point.
    """
    height, width = images.shape[2:]
    half = np.sqrt(1.0 - draws.weight) / 2
    top, bottom = _span(draws.centre[:, 0], half, height)
    left, right = _span(draws.centre[:, 1], half, width)
    y, x = np.arange(height), np.arange(width)
    in_rows = (y >= top[:, None]) & (y < bottom[:, None])
    in_columns = (x >= left[:, None]) & (x < right[:, None])
    box = torch.from_numpy(in_rows[:, None, :, None] & in_columns[:, None, None, :]).to(images.device)
    kept = 1.0 - (bottom - top) * (right - left) / (height * width)
    mixed = torch.where(box, images.index_select(0, _partner(images, draws)), images)
    return mixed, _average(targets, kept, draws)


def _span(centre: np.ndarray, half: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 pixel of the box along one side, clipped to it: int64 [B] each."""
    middle, reach = np.floor(centre * length).astype(np.int64), np.floor(half * length).astype(np.int64)
    return np.clip(middle - reach, 0, length), np.clip(middle + reach, 0, length)


def _partner(values: torch.Tensor, draws: MixDraws) -> torch.Tensor:
    return torch.from_numpy(draws.partner).to(values.device)


def _average(values: torch.Tensor, weight: np.ndarray, draws: MixDraws) -> torch.Tensor:
    """weight v + (1 - weight) v', row by row."""
    share = torch.from_numpy(weight).to(values.device, values.dtype).view(-1, *[1] * (values.ndim - 1))
    return values * share + values.index_select(0, _partner(values, draws)) * (1 - share)
