"""The feedback of kekmodel/MPL-pytorch, to compare with that port: every departure from equation 12 is in this file.

- CE_old is that of the update pass, where x_l shares the batch norm with x_s; CE_new is of a pass over x_l alone. Their
  difference is mostly noise.
- h = CE_new - CE_old has the wrong sign.
- The teacher's cross-entropy that h weighs is that of the strong view against its own argmax, which are not the labels
  that the student was taught.
"""

from __future__ import annotations

import torch

from mpl_scale.mpl.feedback import (
    DROP,
    FeedbackRule,
    Signal,
    StudentUpdate,
    labelled_loss,
    loss_drop,
    register_feedback,
)
from mpl_scale.mpl.losses import cross_entropy
from mpl_scale.mpl.state import State
from mpl_scale.types import Batch


@register_feedback("kekmodel")
class Kekmodel(FeedbackRule):
    """h = CE_new - CE_old on x_l."""

    measures_drop = True

    def __init__(self) -> None:
        self._old: list[torch.Tensor] = []  # [] of each micro-batch

    def saw_labelled(self, logits: torch.Tensor, batch: Batch) -> None:
        """Keep the cross-entropy on x_l before the student's update."""
        self._old.append(cross_entropy(logits, batch.labels).mean())

    def after_update(self, state: State, batch: Batch, update: StudentUpdate) -> Signal:
        """Measure CE at theta', on all ranks."""
        metrics = labelled_loss(state, batch)
        drop = loss_drop(torch.stack(self._old).mean(), metrics)
        h = state.mean_over_ranks(-drop[DROP].double())  # []
        return Signal(h=h, credit=h, metrics={**metrics, **drop})

    def teacher_loss(
        self, credit: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, *, strong: torch.Tensor
    ) -> torch.Tensor:
        """credit * CE of the strong view's logits [U, K] against its own argmax."""
        return super().teacher_loss(credit, strong, strong.detach().argmax(-1), strong=strong)
