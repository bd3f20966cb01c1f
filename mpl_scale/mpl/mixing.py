"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of labelled rows, inside the step.

All is drawn on the device by Philox numbers of (seed, step, global pair), so that a captured step draws anew at each
replay. Rows 2k and 2k + 1 of the global batch share lambda (and CutMix's box) and exchange their images, so the result
does not depend on how rows lie on ranks or in micro-batches of an even number of them.
"""

from __future__ import annotations

import torch

from mpl_scale.mpl.state import MIXING, State
from mpl_scale.philox import uniform
from mpl_scale.types import Batch

_ATTEMPTS = 64
_BOX = 2  # row and column of CutMix's centre


def mixup_share(state: State, batch: Batch) -> torch.Tensor:
    """lambda ~ Beta(alpha, alpha) of each labelled row, alpha being `method.mixup_alpha`: float64 [B].

    The batch has an even number of labelled rows, the first of an even global number.
    """
    return beta(state.method.mixup_alpha, _drawn(state, batch)[:, : 2 * _ATTEMPTS]).repeat_interleave(2)


def cutmix_box(state: State, batch: Batch) -> torch.Tensor:
    """What of each labelled image is its neighbour's: bool [B, 1, H, W].

    A box of sides sqrt(1 - lambda) of the image's about a uniform centre, clipped to the image.
    """
    height, width = batch.labelled.shape[2:]
    half = (1 - mixup_share(state, batch)).sqrt() / 2  # [B]
    centre = _drawn(state, batch)[:, 2 * _ATTEMPTS :].double().repeat_interleave(2, dim=0)  # [B, 2]
    rows, columns = _span(centre[:, 0], half, height), _span(centre[:, 1], half, width)  # bool [B, H], [B, W]
    return rows[:, None, :, None] & columns[:, None, None, :]


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """Each row's other one, [B, ...]."""
    return values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)


def average(values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """share v + (1 - share) v' of each row and its neighbour: floating point [B, ...], share [B]."""
    own = share.to(values.dtype).view(-1, *[1] * (values.ndim - 1))  # [B, 1, ...]
    return values * own + neighbours(values) * (1 - own)


def beta(alpha: float, numbers: torch.Tensor) -> torch.Tensor:
    """Beta(alpha, alpha) numbers in [0, 1], by Jöhnk's rejection: U^(1/a) / (U^(1/a) + V^(1/a)) where the sum is <= 1.

    Args:
        alpha: above 0. A pair is accepted with probability 0.99 at 0.1, 1/2 at 1 and 1/6 at 2.
        numbers: [B, 2 n] in (0, 1), the pairs (U, V) in the order they are tried. Rows whose pairs are all rejected
            (5e-20 of them at alpha = 1, 1e-5 at 2) take 1/2.

    Returns:
        float64 [B].
    """
    logarithms = numbers.double().log() / alpha  # U^(1/a) underflows for small a
    u, v = logarithms[:, 0::2], logarithms[:, 1::2]  # [B, n]
    total = torch.logaddexp(u, v)  # [B, n]
    accepted = total <= 0  # bool [B, n]
    first = accepted.int().argmax(1, keepdim=True)  # int64 [B, 1]
    found = (u - total).gather(1, first)[:, 0].exp()  # [B]
    return torch.where(accepted.any(1), found, torch.full_like(found, 0.5))


def _drawn(state: State, batch: Batch) -> torch.Tensor:
    """The numbers of each pair, float32 [B / 2, columns]."""
    pairs = batch.labelled_rows[::2] // 2  # int64 [B / 2]
    columns = 2 * _ATTEMPTS + _BOX
    return uniform(seed=state.seed, stream=MIXING << 16, step=state.step, rows=pairs, columns=columns)


def _span(centre: torch.Tensor, half: torch.Tensor, length: int) -> torch.Tensor:
    """The pixels of a box along one side: bool [B, length]."""
    middle, reach = (centre * length).floor(), (half * length).floor()  # [B]
    places = torch.arange(length, device=centre.device)  # [length]
    return (places >= (middle - reach)[:, None]) & (places < (middle + reach)[:, None])
