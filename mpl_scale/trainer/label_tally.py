"""What unlabelled images were called since the last line of metrics: counted on the device, beside the step.

The truth, where a source tells it, is compared here alone. It is in no batch and in no state, so that nothing a step
computes can depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from mpl_scale.data.samples.splits import Splits
from mpl_scale.data.samples.truth import UNKNOWN, Truth
from mpl_scale.data.transfer import to_device
from mpl_scale.mesh import Mesh
from mpl_scale.mpl import PseudoLabels
from mpl_scale.types import Batch

MOST_CURVES = 100
"""Classes whose shares are logged one by one; of more, only how even they are."""
_CONFIDENCE, _RIGHT, _KNOWN = -3, -2, -1
"""Places of the sums behind those by class."""


class LabelTally:
    """Pseudo labels of one phase, since the last line.

    counts: float64 [K + 3] on the device, this rank's: images by label, then the sums of confidence, of labels that
    are right and of those whose truth is known. Whole numbers but for the confidence, so sums over ranks are exact.
    """

    def __init__(self, noted: PseudoLabels, splits: Splits, mesh: Mesh) -> None:
        """
        Args:
            noted: what the phase's step fills.
            splits: of the run.
            mesh: this rank's place.
        """
        self._noted, self._mesh, self._classes = noted, mesh, len(splits.images.classes)
        truth = Truth(splits)
        self._truth = truth if truth.any else None
        self._ones = torch.ones(len(noted.labels), dtype=torch.float64, device=mesh.device)
        self.counts = torch.zeros(self._classes + 3, dtype=torch.float64, device=mesh.device)
        self._confidence, self._right, self._known = self.counts[self._classes :]  # [] each, live

    def truth(self, batch: Batch) -> np.ndarray:
        """The classes of a batch's unlabelled images, or UNKNOWN, int64 [U']."""
        if self._truth is None or batch.unlabelled_samples is None:
            return np.full(len(self._ones), UNKNOWN)
        return self._truth(batch.unlabelled_samples)

    def count(self, batch: Batch) -> None:
        """Take in a step that has trained on a batch. Nothing is read on the host."""
        self.counts.index_add_(0, self._noted.labels, self._ones)
        self._confidence.add_(self._noted.confidence.sum())
        if self._truth is not None:
            truth = self.truth(batch)
            self._right.add_((to_device(truth, self._mesh.device) == self._noted.labels).sum())
            self._known.add_(np.count_nonzero(truth != UNKNOWN))

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """What is logged of the counts of all ranks, float [K + 3]; nothing where no image was labelled.

        label_agreement: share of right pseudo labels, of those whose truth is known; absent where none is.
        label_confidence: mean probability of the label. label_evenness: entropy of the labels over its maximum: 1 where
        all classes have as many, 0 where all images have one label. label_share/<class>: by number.
        """
        counts = sums[: self._classes]
        images = sum(counts)
        if not images:
            return {}
        shares = [count / images for count in counts]
        entropy = -sum(share * math.log(share) for share in shares if share)
        agreement = {"label_agreement": sums[_RIGHT] / sums[_KNOWN]} if sums[_KNOWN] else {}
        by_class = {f"label_share/{number}": share for number, share in enumerate(shares)}
        return {
            **agreement,
            "label_confidence": sums[_CONFIDENCE] / images,
            "label_evenness": entropy / math.log(self._classes),
            **(by_class if self._classes <= MOST_CURVES else {}),
        }

    def restart(self) -> None:
        """Begin anew, after a line."""
        self.counts.zero_()

    def state_dict(self) -> list[float] | None:
        """The counts of all ranks, for a checkpoint between two lines; None where there are none. Collective."""
        sums: list[float] = self._mesh.sum_over_ranks(self.counts).tolist()
        return sums if any(sums) else None

    def load_state_dict(self, saved: Sequence[float] | None) -> None:
        """Restore what `state_dict` returned."""
        self.restart()
        if saved is not None and self._mesh.is_main:  # they are of all ranks
            self.counts.copy_(torch.tensor(saved, dtype=torch.float64))
