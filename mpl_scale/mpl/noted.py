"""What a step called its unlabelled images, for people who watch the run: written in place, read by no step."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class PseudoLabels:
    """The labels of this rank's unlabelled images of the last step, and the probability of each in its network.

    labels: int64 [U'] of U' rows of all micro-batches; of soft labels the likeliest class. confidence: float32 [U'].
    Both stay where they are, so that a captured step fills them at each replay.
    """

    def __init__(self, rows: int, *, device: torch.device) -> None:
        self.labels = torch.zeros(rows, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(rows, dtype=torch.float32, device=device)

    @torch.no_grad()
    def note(self, logits: Sequence[torch.Tensor], labels: Sequence[torch.Tensor] | None = None) -> None:
        """Take in a step.

        Args:
            logits: of the network that labels, [U, K] of each micro-batch.
            labels: int64 [U] each, or distributions [U, K]; None: the likeliest classes.
        """
        probabilities = torch.cat(list(logits)).float().softmax(-1)  # [U', K]
        named = probabilities if labels is None else torch.cat(list(labels))  # [U'] or [U', K]
        self.labels.copy_(named if named.ndim == 1 else named.argmax(-1))
        found = probabilities.gather(1, self.labels[:, None])[:, 0]  # [U']
        self.confidence.copy_(found.nan_to_num(0.0))  # a skipped step must not spoil the mean of a whole line
