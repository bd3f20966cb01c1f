"""Teachers that learn hard labels of the weak view on the strong one, where they are confident enough: FixMatch."""

from __future__ import annotations

import torch

from mpl_scale.config.schema import MethodConfig
from mpl_scale.mpl.losses import cross_entropy
from mpl_scale.mpl.training_losses import Metrics, TrainingLoss, register_loss


@register_loss("fixmatch")
class FixMatch(TrainingLoss):
    """CE, and CE of x_s against the argmax of x_u where its probability is tau or more (Sohn et al. 2020, eq. 4).

    tau is `method.pseudo_label_threshold`. Images below it count in the average as 0.
    """

    def unlabelled(self, method: MethodConfig, weak: torch.Tensor, strong: torch.Tensor) -> Metrics:
        """The loss, and nothing of it flows into the weak view."""
        confidence, labels = weak.detach().softmax(-1).max(-1)  # [U], int64 [U]
        confident = confidence >= method.pseudo_label_threshold  # bool [U]
        return {"fixmatch_loss": (cross_entropy(strong, labels) * confident).mean()}
