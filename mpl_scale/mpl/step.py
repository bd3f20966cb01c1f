"""One step of Meta Pseudo Labels: Algorithm 1, top to bottom, next to the paper.

A function of one state and one batch. It reads no device value on the host and branches only on the config, so the
same function runs eagerly or replays as a CUDA graph, on one rank or thousands: it talks to networks (network.py),
never to ranks.
"""

from __future__ import annotations

import torch

from mpl_scale.mpl.feedback import FEEDBACK_RULES, StudentUpdate
from mpl_scale.mpl.losses import accuracy, cross_entropy, sample_labels, uda_loss
from mpl_scale.mpl.methods import register_method
from mpl_scale.mpl.network import Network
from mpl_scale.mpl.state import (
    LABEL_SAMPLING,
    LABELLED_ROWS,
    STRONG_ROWS,
    STUDENT_PASS,
    TEACHER_PASS,
    WEAK_ROWS,
    State,
    teacher_rows,
)
from mpl_scale.philox import uniform
from mpl_scale.types import Batch, StepMetrics


@register_method("mpl", teacher=True, student=True)
def mpl_step(state: State, batch: Batch) -> StepMetrics:
    """Student update, feedback, teacher update (Algorithm 1, with C.3's cosine and baseline by default).

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

    # The teacher sees [x_l, x_u, x_s] as one batch, so that its BN couples the views as in the released code.
    with teacher.module.passes(state.new_pass(TEACHER_PASS, teacher_rows(batch))):  # type: ignore[operator]
        logits = teacher.forward(torch.cat([batch.labelled, batch.weak, batch.strong]))
    labelled, weak, strong = logits.split([len(batch.labelled), len(batch.weak), len(batch.strong)])

    # Pseudo labels y_u ~ P(. | x_u; theta_T)
    teacher_logits = (strong if method.pseudo_label_view == "strong" else weak) / method.pseudo_label_temperature
    pseudo_labels = _pseudo_labels(state, batch, teacher_logits.detach())

    # Student: theta_S' = theta_S - lr grad CE(y_u, S(x_s; theta_S))
    student_logits = _student_pass(state, batch, student)
    student_loss = cross_entropy(student_logits, pseudo_labels, smoothing=method.student_label_smoothing).mean()
    gradient = student.backward(student_loss)
    rule.before_update(state, batch)
    student.apply(now.student_lr)

    # Feedback: h from grad CE(y_l, S(x_l; theta_S')) and the gradient above
    repeat = torch.no_grad()(lambda: _student_pass(state, batch, student, learn=False))
    update = StudentUpdate(targets=pseudo_labels, gradient=gradient, lr=now.student_lr, forward=repeat)
    signal = rule.after_update(state, batch, update)
    baseline = state.baseline.update(signal.h) if method.feedback.baseline else torch.zeros_like(signal.h)
    scale = now.feedback_gate * method.feedback.weight
    credit = scale * (signal.credit if rule.soft_labels else signal.credit - baseline)

    # Teacher: g_T + g_T,supervised + g_T,UDA
    targets = pseudo_labels
    if method.feedback.target == "strong_argmax":
        teacher_logits, targets = strong, strong.detach().argmax(-1)
    teacher_mpl = rule.teacher_loss(credit.detach(), teacher_logits, targets)
    supervised = cross_entropy(labelled, batch.labels, smoothing=method.label_smoothing).mean()
    uda = uda_loss(weak, strong, temperature=method.uda.temperature, threshold=method.uda.threshold).mean()
    teacher.backward(teacher_mpl + method.supervised_weight * supervised + now.uda_weight * uda)
    teacher.apply(now.teacher_lr)

    state.advance()
    return {
        "student_loss": student_loss.detach(),
        "student_accuracy": accuracy(student_logits, pseudo_labels),
        "teacher_supervised_loss": supervised.detach(),
        "teacher_uda_loss": uda.detach(),
        "teacher_mpl_loss": teacher_mpl.detach(),
        "teacher_accuracy": accuracy(labelled, batch.labels),
        "h": scale * (signal.h - baseline),
        "feedback": signal.h,
        "baseline": baseline,
        "teacher_lr": now.teacher_lr,
        "student_lr": now.student_lr,
        "uda_weight": now.uda_weight,
        **signal.metrics,
    }


def _pseudo_labels(state: State, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Labels int64 [U], or distributions [U, K] for soft ones, from the teacher's logits [U, K]."""
    if state.method.pseudo_labels == "soft":
        return logits.softmax(-1)
    if state.method.pseudo_labels == "argmax":
        return logits.argmax(-1)
    rows = batch.unlabelled_rows + WEAK_ROWS
    numbers = uniform(seed=state.seed, stream=LABEL_SAMPLING << 16, step=state.step, rows=rows, columns=logits.shape[1])
    return sample_labels(logits, numbers)


def _student_pass(state: State, batch: Batch, student: Network, *, learn: bool = True) -> torch.Tensor:
    """The student's logits on x_s [U, K]; x_l rides along if configured, for the batch statistics only."""
    images, rows = batch.strong, batch.unlabelled_rows + STRONG_ROWS
    if state.method.student_sees_labelled:
        images = torch.cat([images, batch.labelled])
        rows = torch.cat([rows, batch.labelled_rows + LABELLED_ROWS])
    with student.module.passes(state.new_pass(STUDENT_PASS, rows, learn=learn)):  # type: ignore[operator]
        return student.forward(images)[: len(batch.strong)]
