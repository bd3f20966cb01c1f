"""The baselines of Tables 2, 6 and 7 and the phases around MPL, on the same state, batches and networks.

`supervised`, `uda` and `pseudo_label` train the student's slot: the network that a run returns. The teacher's warm-up
is `uda` on the teacher's slot, the finetuning of section 3.2 is `supervised` on the student's.
"""

from __future__ import annotations

import torch

from mpl_scale.mpl.losses import accuracy, cross_entropy, uda_loss
from mpl_scale.mpl.methods import register_method
from mpl_scale.mpl.network import Network
from mpl_scale.mpl.state import (
    LABELLED_ROWS,
    STRONG_ROWS,
    STUDENT_PASS,
    TEACHER_PASS,
    WEAK_ROWS,
    State,
    teacher_rows,
)
from mpl_scale.types import Batch, StepMetrics


@register_method("supervised", teacher=False, student=True, unlabelled=False)
def supervised_step(state: State, batch: Batch) -> StepMetrics:
    """CE on labelled images with label smoothing (Table 6); also the finetune phase."""
    student = state.student
    assert student is not None
    now = state.schedules.at(state.step)
    with student.module.passes(state.new_pass(STUDENT_PASS, batch.labelled_rows + LABELLED_ROWS)):  # type: ignore[operator]
        logits = student.forward(batch.labelled)
    loss = cross_entropy(logits, batch.labels, smoothing=state.method.label_smoothing).mean()
    student.backward(loss)
    student.apply(now.student_lr)
    state.advance()
    return {
        "student_loss": loss.detach(),
        "student_accuracy": accuracy(logits, batch.labels),
        "student_lr": now.student_lr,
    }


@register_method("uda", teacher=False, student=True)
def uda_step(state: State, batch: Batch) -> StepMetrics:
    """Supervised CE + UDA on the student's slot (Table 7)."""
    assert state.student is not None
    now = state.schedules.at(state.step)
    losses = _consistency(state, batch, state.student, STUDENT_PASS, uda_weight=now.uda_weight)
    state.student.apply(now.student_lr)
    state.advance()
    return {**{f"student_{name}": value for name, value in losses.items()}, "student_lr": now.student_lr}


@register_method("teacher_warmup", teacher=True, student=False)
def teacher_warmup_step(state: State, batch: Batch) -> StepMetrics:
    """Supervised CE + UDA on the teacher's slot: the phase before MPL or pseudo labels."""
    assert state.teacher is not None
    now = state.schedules.at(state.step)
    losses = _consistency(state, batch, state.teacher, TEACHER_PASS, uda_weight=now.uda_weight)
    state.teacher.apply(now.teacher_lr)
    state.advance()
    return {**{f"teacher_{name}": value for name, value in losses.items()}, "teacher_lr": now.teacher_lr}


@register_method("pseudo_label", teacher=True, student=True)
def pseudo_label_step(state: State, batch: Batch) -> StepMetrics:
    """Equation 1: the student learns the argmax labels of a fixed teacher where it is confident (Table 6)."""
    method, teacher, student = state.method, state.teacher, state.student
    assert teacher is not None
    assert student is not None
    now = state.schedules.at(state.step)
    with torch.no_grad():
        rows = batch.unlabelled_rows + WEAK_ROWS
        passes = state.new_pass(TEACHER_PASS, rows, learn=False, dropout=False)
        teacher.module.eval()
        with teacher.module.passes(passes):  # type: ignore[operator]
            confidence, labels = teacher.forward(batch.weak).softmax(-1).max(-1)
        teacher.module.train()
    confident = confidence >= method.pseudo_label_threshold
    images = torch.cat([batch.strong, batch.labelled])
    rows = torch.cat([batch.unlabelled_rows + STRONG_ROWS, batch.labelled_rows + LABELLED_ROWS])
    with student.module.passes(state.new_pass(STUDENT_PASS, rows)):  # type: ignore[operator]
        strong, labelled = student.forward(images).split([len(batch.strong), len(batch.labelled)])
    pseudo = (cross_entropy(strong, labels, smoothing=method.student_label_smoothing) * confident).mean()
    supervised = cross_entropy(labelled, batch.labels, smoothing=method.label_smoothing).mean()
    student.backward(pseudo + method.supervised_weight * supervised)
    student.apply(now.student_lr)
    state.advance()
    return {
        "student_loss": pseudo.detach(),
        "student_supervised_loss": supervised.detach(),
        "student_accuracy": accuracy(labelled, batch.labels),
        "confident": confident.float().mean(),
        "student_lr": now.student_lr,
    }


def _consistency(
    state: State, batch: Batch, network: Network, number: int, *, uda_weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Forward on [x_l, x_u, x_s] as one batch and backward of CE + w UDA; the caller applies the gradient."""
    method = state.method
    with network.module.passes(state.new_pass(number, teacher_rows(batch))):  # type: ignore[operator]
        logits = network.forward(torch.cat([batch.labelled, batch.weak, batch.strong]))
    labelled, weak, strong = logits.split([len(batch.labelled), len(batch.weak), len(batch.strong)])
    supervised = cross_entropy(labelled, batch.labels, smoothing=method.label_smoothing).mean()
    uda = uda_loss(weak, strong, temperature=method.uda.temperature, threshold=method.uda.threshold).mean()
    loss = method.supervised_weight * supervised + uda_weight * uda
    network.backward(loss)
    return {
        "loss": loss.detach(),
        "supervised_loss": supervised.detach(),
        "uda_loss": uda.detach(),
        "accuracy": accuracy(labelled, batch.labels),
    }
