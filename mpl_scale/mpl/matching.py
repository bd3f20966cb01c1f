"""Teachers that learn hard labels of the weak view on the strong one, each image with a weight of its own.

FixMatch has one fixed threshold, FlexMatch one for each class by how many images it has learnt, FreeMatch all of them
from averages of its own confidence, SoftMatch a weight that falls smoothly below the average confidence. What they
average is over the unlabelled batch of the step: of all ranks and micro-batches. K classes, U unlabelled images of a
micro-batch, U' of this rank's step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from mpl_scale.config.schema import MethodConfig
from mpl_scale.mpl.losses import cross_entropy
from mpl_scale.mpl.state import State
from mpl_scale.mpl.training_losses import Metrics, TrainingLoss, register_loss
from mpl_scale.mpl.views import Logits
from mpl_scale.types import Batch


class HardLabels(TrainingLoss, ABC):
    """Base: CE, and CE of x_s against the argmax of x_u times a weight; nothing of it flows into x_u."""

    logged = "hard_label_loss"
    _used: torch.Tensor

    @abstractmethod
    def weights(self, method: MethodConfig, probabilities: torch.Tensor) -> torch.Tensor:
        """The weight of each image, float64 [U], from the weak view's probabilities, float64 [U, K]."""

    def unlabelled(self, method: MethodConfig, weak: torch.Tensor, strong: torch.Tensor) -> Metrics:
        """The mean is over the whole batch, weights of 0 included."""
        probabilities = _probabilities(weak)  # [U, K]
        weights = self.weights(method, probabilities)  # [U]
        self._used = weights.mean()  # []
        losses = cross_entropy(strong, probabilities.argmax(-1))  # [U]
        return {self.logged: (losses * weights.to(losses.dtype)).mean()}

    def __call__(
        self, state: State, batch: Batch, views: Logits, *, weight: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """See TrainingLoss; `used` is the mean weight."""
        loss, metrics = super().__call__(state, batch, views, weight=weight)
        return loss, {**metrics, "used": self._used}


@register_loss("fixmatch")
class FixMatch(HardLabels):
    """Weight 1 where the probability of the label is tau or more, else 0 (Sohn et al. 2020, eq. 4).

    tau is `method.pseudo_label_threshold`.
    """

    logged = "fixmatch_loss"

    def weights(self, method: MethodConfig, probabilities: torch.Tensor) -> torch.Tensor:
        """1 or 0."""
        return (probabilities.amax(-1) >= method.pseudo_label_threshold).double()


class ByClass(HardLabels):
    """Base: weight 1 where the probability of the label is above its class's threshold, which `adapt` finds."""

    adapts = True
    thresholds: torch.Tensor  # float64 [K]

    def weights(self, method: MethodConfig, probabilities: torch.Tensor) -> torch.Tensor:
        """1 or 0."""
        confidence, labels = probabilities.max(-1)  # [U], int64 [U]
        return (confidence > self.thresholds.index_select(0, labels)).double()


@register_loss("flexmatch")
class FlexMatch(ByClass):
    """A threshold M(beta_c) tau for each class c, M(x) = x / (2 - x) (Zhang et al. 2021, algorithm 1, eq. 7, 11, 12).

    An image's status is the label that it last had with a probability above tau, or -1. sigma_c images have status c:
    beta_c = sigma_c / max(max sigma, number of images of status -1), which warms the thresholds up. tau is
    `method.pseudo_label_threshold`. Thresholds are of the status before the step, as in the algorithm.
    """

    logged, per_image = "flexmatch_loss", True

    def buffers(self, *, classes: int, images: int) -> dict[str, torch.Tensor]:
        """The status, int32 [images + 1]; what is not to be kept is written to the last."""
        return {"status": torch.full((images + 1,), -1, dtype=torch.int32)}

    def adapt(self, state: State, parts: Sequence[Batch], views: Sequence[Logits]) -> None:
        """The thresholds, then the status of this step's images; of those that occur twice, the larger label.

        Raises:
            ValueError: a batch that does not say which images it has.
        """
        status, tau = state.loss_buffers["status"], state.method.pseudo_label_threshold
        images, classes = len(status) - 1, views[0].weak.shape[1]
        counts = torch.zeros(classes + 1, dtype=torch.int32, device=status.device)
        counts.index_add_(0, status[:images] + 1, torch.ones_like(status[:images]))  # of -1, 0, ..., K - 1
        learnt = counts[1:].double()  # sigma [K]
        beta = learnt / torch.maximum(learnt.max(), counts[0])  # [K]
        self.thresholds = tau * beta / (2 - beta)

        confidence, labels = _probabilities(torch.cat([part.weak for part in views])).max(-1)  # [U'], int64 [U']
        ids = torch.cat([_ids(part) for part in parts])  # int64 [U']
        kept = torch.stack([torch.where(confidence > tau, ids, images), labels])  # int64 [2, U']
        places, labels = state.gather_over_ranks(kept).transpose(0, 1).flatten(1)  # int64 [ranks U'] each
        status.scatter_reduce_(0, places, labels.to(status.dtype), "amax", include_self=False)
        status[images:].fill_(-1)


@register_loss("freematch")
class FreeMatch(ByClass):
    """Thresholds tau_t p_c / max p, and a loss for fairness between classes (Wang et al. 2023, eq. 5 to 13).

    tau_t, p and h are moving averages, 1 / K before the first step: of the confidence, of the probabilities and of the
    histogram of labels. The fairness loss is -H(SumNorm(p / h), SumNorm(p_s / h_s)), where p_s and h_s are the mean
    probability and the histogram of labels of the strong views above their thresholds. A class that is no label of a
    strong view has no term: its logarithm would be of 0.
    """

    logged = "freematch_loss"
    _fairness: torch.Tensor  # []
    _slope: torch.Tensor  # its derivative by p_s, [K]

    def buffers(self, *, classes: int, images: int) -> dict[str, torch.Tensor]:
        """The three averages, float64 [] and [K]."""
        even = torch.full((classes,), 1 / classes, dtype=torch.float64)
        return {"confidence": even[0].clone(), "probabilities": even, "histogram": even.clone()}

    def adapt(self, state: State, parts: Sequence[Batch], views: Sequence[Logits]) -> None:
        """The averages and thresholds with this step's batch, and what fairness asks of it."""
        buffers, classes = state.loss_buffers, views[0].weak.shape[1]
        weak = _probabilities(torch.cat([part.weak for part in views]))  # [U', K]
        strong = _probabilities(torch.cat([part.strong for part in views]))  # [U', K]
        found = torch.cat([weak.amax(-1, keepdim=True), weak, _one_hot(weak)], 1).mean(0)  # [1 + 2 K]
        confidence, probabilities, histogram = state.mean_over_ranks(found).split([1, classes, classes])
        rate = 1 - state.method.freematch.decay
        buffers["confidence"].lerp_(confidence[0], rate)
        average, labels = (
            buffers["probabilities"].lerp_(probabilities, rate),
            buffers["histogram"].lerp_(histogram, rate),
        )
        self.thresholds = buffers["confidence"] * average / average.max()

        confident = self.weights(state.method, weak)[:, None]  # [U', 1]
        found = torch.cat([confident * strong, confident * _one_hot(strong)], 1).mean(0)  # [2 K]
        mean, seen = state.mean_over_ranks(found).split(classes)  # [K] each
        wanted = _over(average, labels)
        wanted, ratio = wanted / wanted.sum(), _over(mean, seen)  # [K] each
        present = seen > 0  # bool [K]
        total = _at_least_tiny(ratio.sum())  # []
        share = torch.where(present, ratio / total, 1)  # [K]
        self._fairness = (wanted * share.log()).sum()
        self._slope = _over(torch.where(present, wanted, 0), mean) - _over(
            (wanted * present).sum() / total * present, seen
        )

    def __call__(
        self, state: State, batch: Batch, views: Logits, *, weight: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """See TrainingLoss. The fairness loss is of the whole step; its gradient, of this micro-batch's part in it."""
        loss, metrics = super().__call__(state, batch, views, weight=weight)
        confident = self.weights(state.method, _probabilities(views.weak))[:, None]  # [U, 1]
        mean = (confident * views.strong.double().softmax(-1)).mean(0)  # [K]
        fairness = self._fairness + (self._slope * (mean - mean.detach())).sum()  # []
        loss = loss + (state.method.freematch.fairness_weight * fairness).to(loss.dtype)
        return loss, {**metrics, "fairness_loss": self._fairness, "threshold": state.loss_buffers["confidence"].clone()}


@register_loss("softmatch")
class SoftMatch(HardLabels):
    """Weight lambda exp(-(mu - c)^2 / (2 (sigma / n)^2)) below mu, else lambda (Chen et al. 2023, eq. 7 to 10).

    c is the largest probability after uniform alignment, Normalize(q / (K E[q])); labels are those before it. mu and
    sigma^2 are moving averages of the mean of c and of its unbiased variance, 1 / K and 1 before the first step; E[q]
    is one of the probabilities, from the first step's on. n is `softmatch.sigmas`: 1 in the paper.
    """

    logged, adapts = "softmatch_loss", True
    _mean: torch.Tensor  # float64 []
    _deviation: torch.Tensor  # float64 []
    _average: torch.Tensor | None = None  # float64 [K]

    def buffers(self, *, classes: int, images: int) -> dict[str, torch.Tensor]:
        """The averages, float64 [], [] and [K]; 0 where there is none yet."""
        one = torch.ones((), dtype=torch.float64)
        return {"mean": one / classes, "variance": one, "probabilities": torch.zeros(classes, dtype=torch.float64)}

    def adapt(self, state: State, parts: Sequence[Batch], views: Sequence[Logits]) -> None:
        """The averages with this step's batch."""
        buffers, settings = state.loss_buffers, state.method.softmatch
        rate = 1 - settings.decay
        weak = _probabilities(torch.cat([part.weak for part in views]))  # [U', K]
        if settings.alignment == "uniform":
            now, average = state.mean_over_ranks(weak.mean(0)), buffers["probabilities"]  # [K]
            average.copy_(torch.where(average.sum() > 0, average.lerp(now, rate), now))
            self._average = average.clone()
        confidence = self._confidence(weak)  # [U']
        mean, square = state.mean_over_ranks(torch.stack([confidence, confidence.square()], 1).mean(0))  # []
        images = len(weak) * state.data_ranks
        variance = (square - mean.square()).clamp(min=0) * (images / max(images - 1, 1))
        self._mean = buffers["mean"].lerp_(mean, rate).clone()
        self._deviation = buffers["variance"].lerp_(variance, rate).sqrt() / settings.sigmas

    def weights(self, method: MethodConfig, probabilities: torch.Tensor) -> torch.Tensor:
        """In [0, lambda]."""
        below = (self._mean - self._confidence(probabilities)).clamp(min=0) / _at_least_tiny(self._deviation)
        return method.softmatch.max_weight * torch.exp(-below.square() / 2)

    def _confidence(self, probabilities: torch.Tensor) -> torch.Tensor:
        if self._average is not None:
            probabilities = _over(probabilities, self._average)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities.amax(-1)

    def __call__(
        self, state: State, batch: Batch, views: Logits, *, weight: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """See TrainingLoss."""
        loss, metrics = super().__call__(state, batch, views, weight=weight)
        return loss, {**metrics, "threshold": self._mean}


def _ids(batch: Batch) -> torch.Tensor:
    if batch.unlabelled_ids is None:
        raise ValueError(
            "flexmatch keeps a status of every unlabelled image, and this batch does not say which images it has; use "
            "a loader that does (BatchSpec.ids), or mpl_scale.method.teacher_loss = freematch"
        )
    return batch.unlabelled_ids


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    """float64 [*, K], without their graph."""
    return logits.detach().double().softmax(-1)


def _one_hot(probabilities: torch.Tensor) -> torch.Tensor:
    """1 at the largest of each row, float64 [*, K]. F.one_hot reads the device on the host."""
    classes = torch.arange(probabilities.shape[-1], device=probabilities.device)
    return (probabilities.argmax(-1)[:, None] == classes).double()


def _over(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """values / by, 0 where that is by 0."""
    return torch.where(by > 0, values / by, 0)


def _at_least_tiny(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(min=torch.finfo(torch.float64).tiny)
