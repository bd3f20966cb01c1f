"""One step of Meta Pseudo Labels: Algorithm 1, top to bottom, next to the paper.

A function of one state and one batch. It reads no device value on the host and branches only on the config, so the
same function runs eagerly or replays as a CUDA graph, on one rank or thousands: it talks to networks (network.py),
never to ranks. Every pass runs over the step's micro-batches, of which there is one unless gradients are accumulated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpl_scale.mpl.feedback import FEEDBACK_RULES, StudentUpdate
from mpl_scale.mpl.losses import accuracy, cross_entropy, sample_labels
from mpl_scale.mpl.methods import METHODS, register_method
from mpl_scale.mpl.network import Network
from mpl_scale.mpl.state import (
    LABEL_SAMPLING,
    LABELLED_ROWS,
    STRONG_ROWS,
    STUDENT_PASS,
    TEACHER_PASS,
    WEAK_ROWS,
    Logits,
    State,
    backward,
    means,
    stored_views,
)
from mpl_scale.mpl.training_losses import LOSSES
from mpl_scale.philox import uniform
from mpl_scale.types import Batch, StepMetrics


@register_method("reduced_mpl", teacher=True, student=True, teacher_views=stored_views)
@register_method("mpl", teacher=True, student=True)
def mpl_step(state: State, batch: Batch) -> StepMetrics:
    """Student update, feedback, teacher update (Algorithm 1, with C.3's cosine and baseline by default).

    `reduced_mpl` is the same with a small teacher over a large one's stored distributions (appendix E).

    Args:
        state: updated in place.
        batch: this rank's rows, B labelled and U unlabelled in two views.

    Returns:
        0-d device tensors by name: this rank's averages.
    """
    method, teacher, student = state.method, state.teacher, state.student
    assert teacher is not None
    assert student is not None
    now = state.schedules.at(state.step)
    rule = FEEDBACK_RULES[method.feedback.rule]()
    training_loss = LOSSES[method.teacher_loss]()
    look = METHODS[method.name].teacher_views
    parts = batch.split(state.micro_batches)
    measured: list[dict[str, torch.Tensor]] = [{} for _ in parts]

    # The teacher sees [x_l, x_u, x_s] as one batch, so that its BN couples the views as in the released code.
    with torch.set_grad_enabled(not state.deferred_teacher):
        logits = [
            look(state, part, teacher, number=TEACHER_PASS, labelled=training_loss.images(state, part))
            for part in parts
        ]

    # Pseudo labels y_u ~ P(. | x_u; theta_T)
    labels = [_pseudo_labels(state, part, _labelling(state, views)) for part, views in zip(parts, logits, strict=True)]

    # Student: theta_S' = theta_S - lr grad CE(y_u, S(x_s; theta_S))
    def student_losses() -> Iterator[torch.Tensor]:
        for part, targets, metrics in zip(parts, labels, measured, strict=True):
            strong, labelled = _student_pass(state, part, student)
            loss = cross_entropy(strong, targets, smoothing=method.student_label_smoothing).mean()
            metrics |= {"student_loss": loss.detach(), "student_accuracy": accuracy(strong, targets)}
            rule.saw_labelled(labelled.detach(), part)
            yield loss

    gradient = backward(student, student_losses(), len(parts))
    rule.before_update(state, batch)
    student.apply(now.student_lr)

    # Feedback: h from grad CE(y_l, S(x_l; theta_S')) and the gradient above
    @torch.no_grad()
    def repeat() -> torch.Tensor:
        return torch.cat([_student_pass(state, part, student, learn=False)[0] for part in parts])

    update = StudentUpdate(targets=torch.cat(labels), gradient=gradient, lr=now.student_lr, forward=repeat)
    signal = rule.after_update(state, batch, update)
    baseline = state.baseline.update(signal.h) if method.feedback.baseline else torch.zeros_like(signal.h)
    scale = now.feedback_gate * method.feedback.weight
    credit = (scale * (signal.credit if rule.soft_labels else signal.credit - baseline)).detach()
    credits = credit.chunk(len(parts)) if credit.ndim else [credit] * len(parts)

    # Teacher: g_T + g_T,supervised + g_T,UDA, or what its training loss has instead (Table 10)
    def teacher_losses() -> Iterator[torch.Tensor]:
        for part, views, targets, share, metrics in zip(parts, logits, labels, credits, measured, strict=True):
            if state.deferred_teacher:
                images = training_loss.images(state, part)
                views = look(state, part, teacher, number=TEACHER_PASS, labelled=images, learn=False)
            if method.feedback.target == "strong_argmax":
                mpl = rule.teacher_loss(share, views[2], views[2].detach().argmax(-1))
            else:
                mpl = rule.teacher_loss(share, _labelling(state, views), targets)
            own, found = training_loss(state, part, views, weight=now.uda_weight)
            metrics |= {f"teacher_{name}": value for name, value in {**found, "mpl_loss": mpl.detach()}.items()}
            yield mpl + own

    backward(teacher, teacher_losses(), len(parts))
    teacher.apply(now.teacher_lr)

    state.advance()
    return {
        **means(measured),
        "h": scale * (signal.h - baseline),
        "feedback": signal.h,
        "baseline": baseline,
        "teacher_lr": now.teacher_lr,
        "student_lr": now.student_lr,
        "uda_weight": now.uda_weight,
        **signal.metrics,
    }


def _labelling(state: State, views: Logits) -> torch.Tensor:
    """The logits [U, K] that pseudo labels are drawn from, and whose likelihood the feedback moves."""
    _, weak, strong = views
    return (strong if state.method.pseudo_label_view == "strong" else weak) / state.method.pseudo_label_temperature


def _pseudo_labels(state: State, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Labels int64 [U], or distributions [U, K] for soft ones, from the teacher's logits [U, K]."""
    logits = logits.detach()
    if state.method.pseudo_labels == "soft":
        return logits.softmax(-1)
    if state.method.pseudo_labels == "argmax":
        return logits.argmax(-1)
    rows = batch.unlabelled_rows + WEAK_ROWS
    numbers = uniform(seed=state.seed, stream=LABEL_SAMPLING << 16, step=state.step, rows=rows, columns=logits.shape[1])
    return sample_labels(logits, numbers)


def _student_pass(state: State, batch: Batch, student: Network, *, learn: bool = True) -> Logits:
    """The student's logits on x_s [U, K], and on x_l (or none of its rows): for the batch statistics only."""
    images, rows = batch.strong, batch.unlabelled_rows + STRONG_ROWS
    if state.method.student_sees_labelled:
        images = torch.cat([images, batch.labelled])
        rows = torch.cat([rows, batch.labelled_rows + LABELLED_ROWS])
    with student.module.passes(state.new_pass(STUDENT_PASS, rows, learn=learn)):  # type: ignore[operator]
        logits = student.forward(batch.normalise(images))
    return logits[: len(batch.strong)], logits[len(batch.strong) :]
