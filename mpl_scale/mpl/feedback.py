"""The student's feedback to the teacher: rules by registry (equation 12, appendices A and C.3).

A rule looks at the student before and after its update on pseudo labels and returns a `Signal`: the scalar h (the
cosine of g_u and g_l for most), and the weight of each row's cross-entropy in the teacher's loss. Scalar rules give
every row the same weight h - b. Directional rules credit each row with its own share of h, which is the same
expectation at a far smaller variance (FIDELITY 1.4).

Signs. theta' = theta - lr g_u, so CE_old - CE_new = +lr <g_l, g_u> to first order: positive feedback means the pseudo
labels helped, and descending h CE(y_u, T) makes them more likely.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from mpl_scale.config.names import Registry
from mpl_scale.mpl.forward_mode import derivative_of, following
from mpl_scale.mpl.losses import accuracy, cross_entropy, minus_expectation
from mpl_scale.mpl.network import GradientShard, Network
from mpl_scale.mpl.state import FEEDBACK_PASS, State, gradient_dots, means
from mpl_scale.mpl.views import LABELLED_ROWS
from mpl_scale.types import Batch, StepMetrics

FEEDBACK_RULES: Registry[type[FeedbackRule]] = Registry("feedback rule")
register_feedback = FEEDBACK_RULES.register
"""Make a rule available as `mpl_scale.method.feedback.rule`."""
LABELLED_LOSS, DROP = "student_labelled_loss", "labelled_loss_drop"
"""Metrics: the student's loss on x_l at theta', and what its update took off it."""


@dataclass(frozen=True)
class StudentUpdate:
    """What the student's update leaves for a rule.

    targets: labels [U] or distributions [U, K]. smoothing: of them in the student's loss. gradient: the shard of g_u,
    of the smoothed loss. lr: float32 []. forward: logits [U, K] of the student's pass on x_s, repeated with the same
    rows and random numbers, without gradients or BN learning.
    """

    targets: torch.Tensor
    smoothing: float
    gradient: GradientShard
    lr: torch.Tensor
    forward: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Signal:
    """h float64 [], and what weighs the rows' cross-entropies: [] or [U] for labels, [U, K] credits for soft labels."""

    h: torch.Tensor
    credit: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class FeedbackRule:
    """Base: the rule `none`'s behaviour (h = 0), and the teacher's loss of scalar and per-row credits."""

    soft_labels = False
    """Whether the rule is for soft pseudo labels; the others are for hard ones."""
    measures_drop = False
    """Whether its metrics have DROP by themselves."""

    def saw_labelled(self, logits: torch.Tensor, batch: Batch) -> None:
        """Called with the update pass's logits on x_l [B, K] of each micro-batch; [0, K] if that pass had none."""

    def before_update(self, state: State, batch: Batch) -> None:
        """Called after the student's backward pass, before its weights change."""

    def after_update(self, state: State, batch: Batch, update: StudentUpdate) -> Signal:
        """Called once the student's weights are theta'."""
        zero = torch.zeros((), dtype=torch.float64, device=state.step.device)
        return Signal(h=zero, credit=zero)

    def teacher_loss(
        self, credit: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, *, strong: torch.Tensor
    ) -> torch.Tensor:
        """The fed-back loss [] of a micro-batch: mean over rows of credit * CE(y_u, T(x_u)).

        Args:
            credit: what is left of the signal's, [], [U] or [U, K].
            logits: the teacher's on the view that it labelled, [U, K].
            targets: y_u, int64 [U] or distributions [U, K].
            strong: the teacher's logits on x_s, [U, K].
        """
        return (credit.to(logits.dtype) * cross_entropy(logits, targets)).mean()


register_feedback("none")(FeedbackRule)


@register_feedback("cosine")
class Cosine(FeedbackRule):
    """h = cos(g_u, g_l), g_l the gradient on labelled data at theta' (C.3)."""

    def after_update(self, state: State, batch: Batch, update: StudentUpdate) -> Signal:
        """One backward pass on x_l whose gradient is measured and dropped."""
        _, dots, metrics = labelled_gradient(state, batch, update)
        h = self._scalar(dots, update)
        return Signal(h=h, credit=h, metrics=metrics)

    def _scalar(self, dots: torch.Tensor, update: StudentUpdate) -> torch.Tensor:
        return cosine(dots)


@register_feedback("flipped")
class Flipped(Cosine):
    """-cos(g_u, g_l): the sign error of the popular ports, a control that must do worse."""

    def _scalar(self, dots: torch.Tensor, update: StudentUpdate) -> torch.Tensor:
        return -cosine(dots)


@register_feedback("dot")
class Dot(Cosine):
    """h = lr <g_u, g_l>: equation 12 as it stands."""

    def _scalar(self, dots: torch.Tensor, update: StudentUpdate) -> torch.Tensor:
        return update.lr.double() * dots[0]


@register_feedback("loss_difference")
class LossDifference(FeedbackRule):
    """h = CE_old - CE_new on x_l: the same batch statistics, no dropout unless feedback.dropout asks for it."""

    measures_drop = True

    def before_update(self, state: State, batch: Batch) -> None:
        """Measure the cross-entropy on x_l before the student's update."""
        self._old = labelled_loss(state, batch)[LABELLED_LOSS]  # []

    def after_update(self, state: State, batch: Batch, update: StudentUpdate) -> Signal:
        """Measure CE at theta', on all ranks."""
        metrics = labelled_loss(state, batch)
        drop = loss_drop(self._old, metrics)
        h = state.mean_over_ranks(drop[DROP].double())  # []
        return Signal(h=h, credit=h, metrics={**metrics, **drop})


class Directional(FeedbackRule, ABC):
    """Base of the rules that credit rows by the derivative of their log-probabilities along g_l.

    D[i, k] = d/de log S_k(x_i; theta + e g_l) at theta, by one forward-mode pass, or by central difference: two forward
    passes with shifted weights. h is the cosine; credits are divided by |g_u| |g_l| like it. With the student's label
    smoothing s the derivative of row i's cross-entropy is -(1 - s) sum_k q_ik D[i, k] - s mean_k D[i, k].
    """

    relative_step = 1e-3
    """Length of the shift relative to the weights': the truncation error is its square, rounding 1e-7 over it."""

    def before_update(self, state: State, batch: Batch) -> None:
        """Keep theta: it is where g_u was taken."""
        self._weights = [shard.detach().clone() for shard in _student(state).master]

    def after_update(self, state: State, batch: Batch, update: StudentUpdate) -> Signal:
        """What `cosine` does, and then one forward-mode pass or two forward ones, which need no graph."""
        student = _student(state)
        gradient, dots, metrics = labelled_gradient(state, batch, update)
        norms = torch.sqrt(dots[1] * dots[2])  # |g_u| |g_l|, []
        updated = [shard.detach().clone() for shard in student.master]
        differentiate = self._followed if state.forward_mode else self._difference
        derivative = differentiate(student, gradient, update)  # D, float64 [U, K]
        overwrite(student, updated)
        return Signal(h=cosine(dots), credit=self._credit(derivative / norms, update), metrics=metrics)

    def _followed(self, student: Network, direction: GradientShard, update: StudentUpdate) -> torch.Tensor:
        """D [U, K] by one pass with dual numbers; the direction is gathered as weights are."""
        overwrite(student, direction)
        module = student.module
        whole = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        overwrite(student, self._weights)
        with following(module, whole):
            return derivative_of(update.forward().double().log_softmax(-1))

    def _difference(self, student: Network, direction: GradientShard, update: StudentUpdate) -> torch.Tensor:
        """D [U, K] by central difference."""
        squares = gradient_dots(self._weights, direction, student)  # [3]
        step = self.relative_step * torch.sqrt(squares[1] / squares[2])  # []
        plus, minus = (self._shifted(student, direction, sign * step, update) for sign in (1.0, -1.0))
        return (plus - minus) / (2.0 * step)

    def _shifted(
        self, student: Network, direction: GradientShard, step: torch.Tensor, update: StudentUpdate
    ) -> torch.Tensor:
        """log S(x_s) [U, K], float64, at theta + step * direction."""
        shifted = [w + step.to(w.dtype) * d.to(w.dtype) for w, d in zip(self._weights, direction, strict=True)]
        overwrite(student, shifted)
        return update.forward().double().log_softmax(-1)

    @abstractmethod
    def _credit(self, derivative: torch.Tensor, update: StudentUpdate) -> torch.Tensor:
        """What weighs the teacher's loss, from D / (|g_u| |g_l|) [U, K]."""


@register_feedback("per_sample")
class PerSample(Directional):
    """Each row's own share of h: -(1 - s) D[i, y_i] - s mean_k D[i, k] for the sampled label y_i; the rows' mean is h.

    The uniform term does not depend on the label: it moves the credits, and not their expectation over labels.
    """

    def _credit(self, derivative: torch.Tensor, update: StudentUpdate) -> torch.Tensor:
        return minus_expectation(derivative, update.targets, smoothing=update.smoothing)


@register_feedback("soft_exact")
class SoftExact(Directional):
    """The exact gradient of L_l(theta') for soft labels (section 2): mean over rows of (1 - s) sum_k p_ik D[i, k].

    The uniform part of a smoothed target does not depend on the teacher, and has no gradient. With
    `feedback.normalise: credits` the credits of a row are taken from their mean under the teacher's probabilities, and
    all are divided by their root mean square, over the rows of all ranks, instead of by |g_u| |g_l|.
    """

    soft_labels = True

    def after_update(self, state: State, batch: Batch, update: StudentUpdate) -> Signal:
        """As of Directional, with credits of either normalisation."""
        signal = super().after_update(state, batch, update)
        if state.method.feedback.normalise == "norms":
            return signal
        centred, variance = deviations(signal.credit, update.targets)
        scale = torch.sqrt(state.mean_over_ranks(variance.mean()))  # []
        return replace(signal, credit=divided(centred, scale))

    def _credit(self, derivative: torch.Tensor, update: StudentUpdate) -> torch.Tensor:
        return (1.0 - update.smoothing) * derivative

    def teacher_loss(
        self, credit: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, *, strong: torch.Tensor
    ) -> torch.Tensor:
        """credit [U, K]; the gradient flows through the teacher's probabilities. A baseline cancels: they sum to 1."""
        return (logits.softmax(-1) * credit.to(logits.dtype)).sum(-1).mean()


def deviations(credit: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Credits [U, K] less their mean under the rows' distributions [U, K], and their variance under them, [U].

    Probabilities sum to 1, so what is taken off has no gradient.
    """
    probabilities = targets.to(credit.dtype)
    centred = credit - (probabilities * credit).sum(-1, keepdim=True)
    return centred, (probabilities * centred.square()).sum(-1)


def divided(credit: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """credit / scale, and 0 where the scale is 0: a teacher that is sure of every row hears nothing."""
    return torch.where(scale > 0, credit / scale, 0.0)


def cosine(dots: torch.Tensor) -> torch.Tensor:
    """<u, v> / (|u| |v|) from [<u, v>, <u, u>, <v, v>]; 0 where a gradient vanishes."""
    return dots[0] / torch.sqrt(dots[1] * dots[2]).clamp(min=torch.finfo(dots.dtype).tiny)


def _labelled_pass(state: State, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The student's mean CE on x_l, and what to log; BN normalises by this micro-batch and learns nothing."""
    student = _student(state)
    rows = batch.labelled_rows + LABELLED_ROWS  # int64 [B]
    pass_ = state.new_pass(FEEDBACK_PASS, rows, learn=False, dropout=state.method.feedback.dropout)
    logits = student.forward(batch.normalise(batch.labelled), pass_)  # [B, K]
    loss = cross_entropy(logits, batch.labels).mean()  # []
    metrics = {LABELLED_LOSS: loss.detach(), "student_labelled_accuracy": accuracy(logits, batch.labels)}
    return loss, metrics


@torch.no_grad()
def labelled_loss(state: State, batch: Batch) -> dict[str, torch.Tensor]:
    """The student's mean CE on this rank's x_l, and its accuracy, under the names they are logged by."""
    return means([_labelled_pass(state, part)[1] for part in batch.split(state.micro_batches)])


def loss_drop(before: torch.Tensor | None, metrics: StepMetrics) -> dict[str, torch.Tensor]:
    """CE at theta [] less that at theta' by the metrics, of this rank's x_l; nothing where one of them is unknown."""
    after = metrics.get(LABELLED_LOSS)
    return {} if before is None or after is None else {DROP: before - after}


def labelled_gradient(
    state: State, batch: Batch, update: StudentUpdate
) -> tuple[GradientShard, torch.Tensor, dict[str, torch.Tensor]]:
    """g_l at theta', its dots with g_u (float64 [3]) and what to log; no gradient is left in the student."""
    student, measured = _student(state), []
    for part in batch.split(state.micro_batches):
        loss, metrics = _labelled_pass(state, part)
        student.accumulate(loss / state.micro_batches)
        measured.append(metrics)
    gradient = student.reduce()  # fp32 shards [N]
    student.discard()
    dots = gradient_dots(update.gradient, gradient, student)
    metrics = {
        **means(measured),
        "cosine": cosine(dots),
        "student_gradient_norm": torch.sqrt(dots[1]),
        "labelled_gradient_norm": torch.sqrt(dots[2]),
    }
    return gradient, dots, metrics


def _student(state: State) -> Network:
    assert state.student is not None
    return state.student


def overwrite(network: Network, shards: Sequence[torch.Tensor]) -> None:
    """Replace the network's weights by shards like its masters'."""
    for shard, value in zip(network.master, shards, strict=True):
        shard.copy_(value)
    network.refresh_weights()
