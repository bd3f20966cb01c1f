"""How a network is trained on labelled images, and on unlabelled ones beside them: losses by registry (Tables 6 to 10).

One loss serves in three places: as a baseline, on the student's slot; in the teacher's warm-up; and in MPL, where the
teacher follows it beside the student's feedback (`mpl_scale.method.teacher_loss`, Table 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from mpl_scale.config.names import Registry
from mpl_scale.config.schema import MethodConfig
from mpl_scale.mpl.losses import accuracy, cross_entropy, uda_loss, where_unsure
from mpl_scale.mpl.mixing import average, cutmix_box, mixup_share, neighbours
from mpl_scale.mpl.state import State
from mpl_scale.mpl.views import Logits
from mpl_scale.types import Batch

LOSSES: Registry[type[TrainingLoss]] = Registry("training loss")
register_loss = LOSSES.register
"""Make a loss available as `mpl_scale.method.teacher_loss`."""

Metrics = dict[str, torch.Tensor]


class TrainingLoss:
    """Base: the loss `supervised`, CE on labelled images with label smoothing (Table 6). One instance for each step.

    adapts: it keeps buffers, and `adapt` looks at the step's whole batch first. per_image: batches say which unlabelled
    images they have, `Batch.unlabelled_ids`.
    """

    adapts: ClassVar[bool] = False
    per_image: ClassVar[bool] = False

    def buffers(self, *, classes: int, images: int) -> dict[str, torch.Tensor]:
        """What it keeps from step to step, `State.loss_buffers`, as a phase begins; the same on every rank.

        images: number of unlabelled ones in the data set.
        """
        return {}

    def adapt(self, state: State, parts: Sequence[Batch], views: Sequence[Logits]) -> None:
        """Update `state.loss_buffers` in place, and note what the step needs of them.

        Args:
            state: its buffers are the same on every rank before, and must be after.
            parts: this rank's micro-batches of the step.
            views: their logits, whose graphs are of no use here.
        """

    def images(self, state: State, batch: Batch) -> torch.Tensor:
        """What the network sees of x_l, normalised, [B, ...]."""
        return batch.normalise(batch.labelled)

    def targets(self, state: State, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        """The targets for logits [B, K]: labels, int64 [B], or distributions, [B, K]."""
        return batch.labels

    def supervised(self, method: MethodConfig, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The part on labelled images, from their logits [B, K]; []."""
        return cross_entropy(logits, targets, smoothing=method.label_smoothing).mean()

    def unlabelled(self, method: MethodConfig, weak: torch.Tensor, strong: torch.Tensor) -> Metrics:
        """At most one loss on unlabelled images, by its name in the log, from logits [U, K] of x_u and x_s."""
        return {}

    def __call__(
        self, state: State, batch: Batch, views: Logits, *, weight: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """The loss [] of a micro-batch, and what to log.

        Args:
            state: its method's section is read.
            batch: the micro-batch.
            views: logits of x_l as `images` shows it, x_u and x_s.
            weight: of the unlabelled part, [].
        """
        method, (labelled, weak, strong) = state.method, views
        targets = self.targets(state, batch, labelled)  # int64 [B] or [B, K]
        supervised = self.supervised(method, labelled, targets)  # []
        loss, metrics = method.supervised_weight * supervised, {"supervised_loss": supervised.detach()}
        for name, value in self.unlabelled(method, weak, strong).items():
            loss, metrics[name] = loss + weight * value, value.detach()
        return loss, {**metrics, "accuracy": accuracy(labelled, targets)}


register_loss("supervised")(TrainingLoss)


@register_loss("uda")
class UDA(TrainingLoss):
    """CE, and consistency between the views (Table 7), each less what its mask leaves out (C.4)."""

    def supervised(self, method: MethodConfig, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """CE of the images that the network is not yet sure of; the others count in the average as 0."""
        losses = cross_entropy(logits, targets, smoothing=method.label_smoothing)  # [B]
        if method.uda.labelled_threshold < 1:
            losses = losses * where_unsure(logits, targets, threshold=method.uda.labelled_threshold)
        return losses.mean()

    def unlabelled(self, method: MethodConfig, weak: torch.Tensor, strong: torch.Tensor) -> Metrics:
        """CE of x_s against the sharpened distribution of x_u, where that is confident."""
        loss = uda_loss(weak, strong, temperature=method.uda.temperature, threshold=method.uda.threshold)  # [U]
        return {"uda_loss": loss.mean()}


@register_loss("mixup")
class Mixup(TrainingLoss):
    """CE of mixed labelled images against mixed labels (Zhang et al. 2018; Table 10)."""

    def images(self, state: State, batch: Batch) -> torch.Tensor:
        """The labelled images, each mixed with its neighbour in the batch."""
        return average(batch.normalise(batch.labelled), mixup_share(state, batch))

    def share(self, state: State, batch: Batch) -> torch.Tensor:
        """How much of each image is its own, [B]."""
        return mixup_share(state, batch)

    def targets(self, state: State, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        """One-hot labels [N, K], mixed as their images are."""
        # F.one_hot reads the device on the host
        one_hot = batch.labels[:, None] == torch.arange(logits.shape[1], device=batch.labels.device)  # bool [B, K]
        return average(one_hot.to(logits.dtype), self.share(state, batch))


@register_loss("cutmix")
class CutMix(Mixup):
    """CE of labelled images with a box of another one's, against labels mixed by area (Yun et al. 2019)."""

    def images(self, state: State, batch: Batch) -> torch.Tensor:
        """The neighbour's pixels in the box."""
        return batch.normalise(torch.where(cutmix_box(state, batch), neighbours(batch.labelled), batch.labelled))

    def share(self, state: State, batch: Batch) -> torch.Tensor:
        """The share of the image's area outside the pasted box."""
        return 1 - cutmix_box(state, batch).double().mean((1, 2, 3))


@register_loss("pseudo_label")
class SelfLabels(TrainingLoss):
    """CE, and CE of x_u against its own argmax where that is confident (Lee 2013; Table 10): one view alone."""

    def unlabelled(self, method: MethodConfig, weak: torch.Tensor, strong: torch.Tensor) -> Metrics:
        """Weighed as the consistency of `uda` is."""
        confidence, labels = weak.detach().softmax(-1).max(-1)  # [U], int64 [U]
        confident = confidence >= method.pseudo_label_threshold  # bool [U]
        return {"self_label_loss": (cross_entropy(weak, labels) * confident).mean()}
