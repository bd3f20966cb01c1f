"""The baselines of Tables 2, 6, 7, 10 and 11 and the phases around MPL, on the same state, batches and networks.

All baselines train the student's slot: the network that a run returns. The teacher's warm-up is its training loss on
the teacher's slot, the finetuning of section 3.2 is `supervised` on the student's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpl_scale.mpl.losses import accuracy, cross_entropy
from mpl_scale.mpl.methods import METHODS, Step, Views, register_method
from mpl_scale.mpl.network import Network
from mpl_scale.mpl.state import (
    LABELLED_ROWS,
    STRONG_ROWS,
    STUDENT_PASS,
    TEACHER_PASS,
    WEAK_ROWS,
    State,
    backward,
    means,
    three_views,
)
from mpl_scale.mpl.training_losses import LOSSES
from mpl_scale.types import Batch, StepMetrics


@register_method("supervised", teacher=False, student=True, unlabelled=False)
def supervised_step(state: State, batch: Batch) -> StepMetrics:
    """CE on labelled images with label smoothing (Table 6); also the finetune phase."""
    student = state.student
    assert student is not None
    now = state.schedules.at(state.step)
    measured: list[dict[str, torch.Tensor]] = []

    def losses() -> Iterator[torch.Tensor]:
        for part in batch.split(state.micro_batches):
            with student.module.passes(state.new_pass(STUDENT_PASS, part.labelled_rows + LABELLED_ROWS)):  # type: ignore[operator]
                logits = student.forward(part.normalise(part.labelled))
            loss = cross_entropy(logits, part.labels, smoothing=state.method.label_smoothing).mean()
            measured.append({"student_loss": loss.detach(), "student_accuracy": accuracy(logits, part.labels)})
            yield loss

    backward(student, losses(), state.micro_batches)
    student.apply(now.student_lr)
    state.advance()
    return {**means(measured), "student_lr": now.student_lr}


def _on_the_students_slot(loss: str) -> Step:
    """A step that trains the student's slot by a training loss (Tables 7 and 10)."""

    def step(state: State, batch: Batch) -> StepMetrics:
        assert state.student is not None
        now = state.schedules.at(state.step)
        losses = _trained(state, batch, state.student, STUDENT_PASS, look=three_views, loss=loss, weight=now.uda_weight)
        state.student.apply(now.student_lr)
        state.advance()
        return {**{f"student_{name}": value for name, value in losses.items()}, "student_lr": now.student_lr}

    return step


register_method("uda", teacher=False, student=True)(_on_the_students_slot("uda"))
for _name in ("mixup", "cutmix"):
    register_method(_name, teacher=False, student=True, unlabelled=False)(_on_the_students_slot(_name))


@register_method("teacher_warmup", teacher=True, student=False)
def teacher_warmup_step(state: State, batch: Batch) -> StepMetrics:
    """The teacher's training loss on its slot: the phase before MPL or pseudo labels."""
    assert state.teacher is not None
    now, method = state.schedules.at(state.step), state.method
    look = METHODS[method.name].teacher_views
    losses = _trained(
        state, batch, state.teacher, TEACHER_PASS, look=look, loss=method.teacher_loss, weight=now.uda_weight
    )
    state.teacher.apply(now.teacher_lr)
    state.advance()
    return {**{f"teacher_{name}": value for name, value in losses.items()}, "teacher_lr": now.teacher_lr}


@register_method("pseudo_label", teacher=True, student=True)
def pseudo_label_step(state: State, batch: Batch) -> StepMetrics:
    """Equation 1: the student learns the argmax labels of a fixed teacher where it is confident (Table 6)."""
    return _taught_by_a_fixed_teacher(state, batch, soft=False)


@register_method("noisy_student", teacher=True, student=True)
def noisy_student_step(state: State, batch: Batch) -> StepMetrics:
    """The same with whole distributions (Table 11); the noise is dropout, drop-path and the strong view."""
    return _taught_by_a_fixed_teacher(state, batch, soft=True)


def _taught_by_a_fixed_teacher(state: State, batch: Batch, *, soft: bool) -> StepMetrics:
    method, student = state.method, state.student
    assert student is not None
    now = state.schedules.at(state.step)
    measured: list[dict[str, torch.Tensor]] = []

    def losses() -> Iterator[torch.Tensor]:
        for part in batch.split(state.micro_batches):
            probabilities = _fixed_teacher(state, part)
            confidence, labels = probabilities.max(-1)
            targets = probabilities if soft else labels
            confident = confidence >= method.pseudo_label_threshold
            rows = torch.cat([part.unlabelled_rows + STRONG_ROWS, part.labelled_rows + LABELLED_ROWS])
            with student.module.passes(state.new_pass(STUDENT_PASS, rows)):  # type: ignore[operator]
                logits = student.forward(part.normalise(torch.cat([part.strong, part.labelled])))
            strong, labelled = logits.split([len(part.strong), len(part.labelled)])
            pseudo = (cross_entropy(strong, targets, smoothing=method.student_label_smoothing) * confident).mean()
            supervised = cross_entropy(labelled, part.labels, smoothing=method.label_smoothing).mean()
            measured.append(
                {
                    "student_loss": pseudo.detach(),
                    "student_supervised_loss": supervised.detach(),
                    "student_accuracy": accuracy(labelled, part.labels),
                    "confident": confident.float().mean(),
                }
            )
            yield pseudo + method.supervised_weight * supervised

    backward(student, losses(), state.micro_batches)
    student.apply(now.student_lr)
    state.advance()
    return {**means(measured), "student_lr": now.student_lr}


@torch.no_grad()
def _fixed_teacher(state: State, batch: Batch) -> torch.Tensor:
    """The teacher's probabilities on x_u [U, K]: those stored, or of the network in evaluation mode."""
    if batch.unlabelled_distributions is not None:
        return batch.unlabelled_distributions
    teacher = state.teacher
    assert teacher is not None
    passes = state.new_pass(TEACHER_PASS, batch.unlabelled_rows + WEAK_ROWS, learn=False, dropout=False)
    teacher.module.eval()
    with teacher.module.passes(passes):  # type: ignore[operator]
        logits = teacher.forward(batch.normalise(batch.weak))
    teacher.module.train()
    return logits.softmax(-1)


def _trained(
    state: State, batch: Batch, network: Network, number: int, *, look: Views, loss: str, weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Forward on [x_l, x_u, x_s] as one batch and backward of a training loss; the caller applies the gradient."""
    training_loss = LOSSES[loss]()
    measured: list[dict[str, torch.Tensor]] = []

    def losses() -> Iterator[torch.Tensor]:
        for part in batch.split(state.micro_batches):
            views = look(state, part, network, number=number, labelled=training_loss.images(state, part))
            total, found = training_loss(state, part, views, weight=weight)
            measured.append({"loss": total.detach(), **found})
            yield total

    backward(network, losses(), state.micro_batches)
    return means(measured)
