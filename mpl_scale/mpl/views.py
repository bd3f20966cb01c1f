"""What a network sees of a batch in one pass, and the names its logits go by.

Each view of a row has a global number of its own, so that its random numbers do not depend on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mpl_scale.types import Batch

LABELLED_ROWS, WEAK_ROWS, STRONG_ROWS = (view << 28 for view in range(3))


class Logits(NamedTuple):
    """A network's logits on the three views."""

    labelled: torch.Tensor  # [B, K], of x_l
    weak: torch.Tensor  # [U, K], of x_u
    strong: torch.Tensor  # [U, K], of x_s


@dataclass(frozen=True)
class Seen:
    """The inputs of one pass of a network."""

    inputs: torch.Tensor  # [N, ...], floating point
    rows: torch.Tensor  # int64 [N], global
    sizes: tuple[int, ...]  # of x_l, x_u and x_s; of x_l and x_u where both views of x_u are one

    def split(self, logits: torch.Tensor) -> Logits:
        """Logits of each view, from those of the whole pass [N, K]."""
        labelled, weak, *strong = logits.split(self.sizes)
        return Logits(labelled, weak, *strong or [weak])


Views = Callable[[Batch, torch.Tensor], Seen]
"""(batch, what is seen of x_l, normalised, [B, ...]) -> what the network is given."""


def three_views(batch: Batch, labelled: torch.Tensor) -> Seen:
    """[x_l, x_u, x_s] as one batch, so that batch norm couples the views as in the released code."""
    unlabelled = batch.normalise(torch.cat([batch.weak, batch.strong]))  # [2 U, ...]
    sizes = len(batch.labelled), len(batch.weak), len(batch.strong)
    return Seen(torch.cat([labelled, unlabelled]), _rows(batch), sizes)


def stored_views(batch: Batch, labelled: torch.Tensor) -> Seen:
    """A trained teacher's stored distributions instead of images (appendix E): one of each image, so x_s is x_u.

    Raises:
        ValueError: the batch has none.
    """
    stored, unlabelled = batch.labelled_distributions, batch.unlabelled_distributions  # [B, K], [U, K]
    if stored is None or unlabelled is None:
        raise ValueError(
            "mpl_scale.method.name = reduced_mpl learns from stored distributions, and the batch has none; "
            "set mpl_scale.data.distributions"
        )
    sizes = len(stored), len(unlabelled)
    return Seen(torch.cat([stored, unlabelled]), _rows(batch)[: sum(sizes)], sizes)


def _rows(batch: Batch) -> torch.Tensor:
    """Global rows of [x_l, x_u, x_s]: int64 [B + 2 U]."""
    unlabelled = batch.unlabelled_rows
    return torch.cat([batch.labelled_rows + LABELLED_ROWS, unlabelled + WEAK_ROWS, unlabelled + STRONG_ROWS])
