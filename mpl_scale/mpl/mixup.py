"""Mixup inside the step: neighbouring rows of a labelled batch, mixed by Philox numbers of (seed, step, global pair).

The host-side mixes of `augment/mix.py` with everything on the device, so that a captured step draws anew at each
replay. Rows 2k and 2k + 1 of the global batch share lambda and exchange their images, so the result does not depend on
how rows lie on ranks or in micro-batches of an even number of them.
"""

from __future__ import annotations

import torch

from mpl_scale.mpl.state import MIXING, State
from mpl_scale.philox import uniform
from mpl_scale.types import Batch

_ATTEMPTS = 64


def mix_rows(state: State, batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """lambda v + (1 - lambda) v' of each labelled row and its neighbour, [B, ...].

    Args:
        state: its method's `mixup_alpha` is alpha of lambda ~ Beta(alpha, alpha).
        batch: an even number of labelled rows, the first of an even global number.
        values: of these rows, floating point [B, ...]: images, or one-hot labels. All values of a step are mixed alike.
    """
    numbers = uniform(
        seed=state.seed,
        stream=MIXING << 16,
        step=state.step,
        rows=batch.labelled_rows[::2] // 2,
        columns=2 * _ATTEMPTS,
    )
    weight = beta(state.method.mixup_alpha, numbers).repeat_interleave(2)
    share = weight.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
    other = values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)
    return values * share + other * (1 - share)


def beta(alpha: float, numbers: torch.Tensor) -> torch.Tensor:
    """Beta(alpha, alpha) numbers [B] from uniform ones [B, 2 n], as `augment.mix.beta`; float64."""
    logarithms = numbers.double().log() / alpha
    u, v = logarithms[:, 0::2], logarithms[:, 1::2]
    total = torch.logaddexp(u, v)
    accepted = total <= 0
    first = accepted.int().argmax(1, keepdim=True)
    found = (u - total).gather(1, first)[:, 0].exp()
    return torch.where(accepted.any(1), found, torch.full_like(found, 0.5))
