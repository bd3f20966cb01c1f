"""One step of Meta Pseudo Labels: Algorithm 1, top to bottom, next to the paper.

A function of one state and one batch. It reads no device value on the host and branches only on the config, so the
same function runs eagerly or replays as a CUDA graph, on one rank or thousands: it talks to networks (network.py),
never to ranks. Every pass runs over the step's micro-batches (parts), of which there is one unless gradients are
accumulated. B labelled and U unlabelled images in a part, K classes.
"""

from __future__ import annotations

import torch

from mpl_scale.mpl.feedback import FEEDBACK_RULES, LABELLED_LOSS, StudentUpdate, labelled_loss, loss_drop
from mpl_scale.mpl.losses import accuracy, cross_entropy, sample_labels
from mpl_scale.mpl.methods import CONFIGURED, register_method
from mpl_scale.mpl.network import Network
from mpl_scale.mpl.state import LABEL_SAMPLING, STUDENT_PASS, TEACHER_PASS, State, means
from mpl_scale.mpl.training_losses import LOSSES, TrainingLoss
from mpl_scale.mpl.views import LABELLED_ROWS, STRONG_ROWS, WEAK_ROWS, Logits, stored_views
from mpl_scale.philox import uniform
from mpl_scale.types import Batch, StepMetrics


@register_method("reduced_mpl", teacher=True, student=True, teacher_views=stored_views, loss=CONFIGURED)
@register_method("mpl", teacher=True, student=True, loss=CONFIGURED)
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
    now = state.schedules.at(state.step)  # each float32 []
    rule = FEEDBACK_RULES[method.feedback.rule]()
    training_loss = LOSSES[method.teacher_loss]()
    smoothing = method.student_label_smoothing
    parts = batch.split(state.micro_batches)
    measured: list[dict[str, torch.Tensor]] = [{} for _ in parts]

    # Teacher: z = T([x_l, x_u, x_s]; theta_T)
    with torch.set_grad_enabled(not state.deferred_teacher):
        logits = [_teacher_pass(state, part, teacher, loss=training_loss) for part in parts]  # [B, K], [U, K], [U, K]
    training_loss.adapt(state, parts, logits)

    # Pseudo labels: y_u ~ P(. | x_u; theta_T)
    labels = [_pseudo_labels(state, *pair) for pair in zip(parts, logits, strict=True)]  # int64 [U] or [U, K] if soft
    state.note_labels([_labelling(state, views) for views in logits], labels)

    # Student: theta_S' = theta_S - lr g_u, where g_u = grad CE(y_u, S(x_s; theta_S))
    for part, targets, metrics in zip(parts, labels, measured, strict=True):
        strong, labelled = _student_pass(state, part, student)  # [U, K], [B, K]
        loss = cross_entropy(strong, targets, smoothing=smoothing).mean()  # []
        student.accumulate(loss / len(parts))
        rule.saw_labelled(labelled.detach(), part)
        metrics |= {"student_loss": loss.detach(), "student_accuracy": accuracy(strong, targets)}
    gradient = student.reduce()  # g_u: fp32 shards [N]
    rule.before_update(state, batch)
    old_loss = labelled_loss(state, batch)[LABELLED_LOSS] if state.measure_drop else None  # [], to be logged only
    student.apply(now.student_lr)

    # Feedback: h from g_u and grad CE(y_l, S(x_l; theta_S')), less its moving average
    @torch.no_grad()
    def repeat() -> torch.Tensor:
        return torch.cat([_student_pass(state, part, student, learn=False)[0] for part in parts])

    update = StudentUpdate(
        targets=torch.cat(labels), smoothing=smoothing, gradient=gradient, lr=now.student_lr, forward=repeat
    )
    signal = rule.after_update(state, batch, update)  # h float64 [], credit [], [U'] or [U', K] of U' rows of all parts
    baseline = state.baseline.update(signal.h) if method.feedback.baseline else torch.zeros_like(signal.h)  # []
    scale = now.feedback_gate * method.feedback.weight  # []
    credit = (scale * (signal.credit if rule.soft_labels else signal.credit - baseline)).detach()  # as signal.credit
    credits = credit.chunk(len(parts)) if credit.ndim else [credit] * len(parts)  # [], [U] or [U, K] each

    # Teacher: theta_T' = theta_T - lr (h grad CE(y_u, T(x_u)) + the gradient of its training loss (UDA's by default))
    for part, views, targets, share, metrics in zip(parts, logits, labels, credits, measured, strict=True):
        if state.deferred_teacher:
            views = _teacher_pass(state, part, teacher, loss=training_loss, learn=False)
        mpl = rule.teacher_loss(share, _labelling(state, views), targets, strong=views.strong)  # []
        own, found = training_loss(state, part, views, weight=now.uda_weight)  # []
        teacher.accumulate((mpl + own) / len(parts))
        metrics |= {f"teacher_{name}": value for name, value in {**found, "mpl_loss": mpl.detach()}.items()}
    teacher.reduce()
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
        **loss_drop(old_loss, signal.metrics),
    }


def _teacher_pass(state: State, batch: Batch, teacher: Network, *, loss: TrainingLoss, learn: bool = True) -> Logits:
    """The teacher's logits on x_l as its training loss shows it, x_u and x_s."""
    seen = state.teacher_views(batch, loss.images(state, batch))
    return state.view_logits(teacher, TEACHER_PASS, seen, learn=learn)


def _labelling(state: State, views: Logits) -> torch.Tensor:
    """The logits [U, K] that pseudo labels are drawn from, and whose likelihood the feedback moves."""
    view = views.strong if state.method.pseudo_label_view == "strong" else views.weak  # [U, K]
    return view / state.method.pseudo_label_temperature


def _pseudo_labels(state: State, batch: Batch, views: Logits) -> torch.Tensor:
    """Labels int64 [U], or distributions [U, K] for soft ones, from the teacher's logits."""
    logits = _labelling(state, views).detach()  # [U, K]
    if state.method.pseudo_labels == "soft":
        return logits.softmax(-1)
    if state.method.pseudo_labels == "argmax":
        return logits.argmax(-1)
    rows = batch.unlabelled_rows + WEAK_ROWS  # int64 [U]
    numbers = uniform(seed=state.seed, stream=LABEL_SAMPLING << 16, step=state.step, rows=rows, columns=logits.shape[1])
    return sample_labels(logits, numbers)


def _student_pass(
    state: State, batch: Batch, student: Network, *, learn: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's logits on x_s [U, K], and on x_l [B, K] (or none of its rows): for the batch statistics only."""
    images, rows = batch.strong, batch.unlabelled_rows + STRONG_ROWS  # [U, ...], int64 [U]
    if state.method.student_sees_labelled:
        images = torch.cat([images, batch.labelled])  # [U + B, ...]
        rows = torch.cat([rows, batch.labelled_rows + LABELLED_ROWS])  # int64 [U + B]
    logits = student.forward(batch.normalise(images), state.new_pass(STUDENT_PASS, rows, learn=learn))
    return logits[: len(batch.strong)], logits[len(batch.strong) :]
