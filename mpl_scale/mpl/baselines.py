"""The baselines of Tables 2, 6, 7, 10 and 11 and the phases around MPL, on the same state, batches and networks.

All baselines train the student's slot: the network that a run returns. The teacher's warm-up is its training loss on
the teacher's slot, the finetuning of section 3.2 is `supervised` on the student's. B labelled and U unlabelled images
in a micro-batch, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch

from mpl_scale.mpl.losses import accuracy, cross_entropy
from mpl_scale.mpl.methods import CONFIGURED, Step, register_method
from mpl_scale.mpl.network import Network
from mpl_scale.mpl.state import STUDENT_PASS, TEACHER_PASS, State, means
from mpl_scale.mpl.training_losses import LOSSES, Metrics
from mpl_scale.mpl.views import LABELLED_ROWS, STRONG_ROWS, WEAK_ROWS, Logits, three_views
from mpl_scale.types import Batch, StepMetrics


@register_method("supervised", teacher=False, student=True, unlabelled=False)
def supervised_step(state: State, batch: Batch) -> StepMetrics:
    """CE on labelled images with label smoothing (Table 6); also the finetune phase."""
    student, measured, now = state.student, list[Metrics](), state.schedules.at(state.step)
    assert student is not None
    for part in batch.split(state.micro_batches):
        pass_ = state.new_pass(STUDENT_PASS, part.labelled_rows + LABELLED_ROWS)
        logits = student.forward(part.normalise(part.labelled), pass_)  # [B, K]
        loss = cross_entropy(logits, part.labels, smoothing=state.method.label_smoothing).mean()  # []
        student.accumulate(loss / state.micro_batches)
        measured.append({"student_loss": loss.detach(), "student_accuracy": accuracy(logits, part.labels)})
    _update(state, student, lr=now.student_lr)
    return {**means(measured), "student_lr": now.student_lr}


def _on_the_students_slot(loss: str) -> Step:
    """A step that trains the student's slot by a training loss (Tables 7 and 10)."""

    def step(state: State, batch: Batch) -> StepMetrics:
        return _train(state, batch, "student", loss=loss)

    return step


for _name in ("uda", "fixmatch", "flexmatch", "freematch", "softmatch"):
    register_method(_name, teacher=False, student=True, loss=_name)(_on_the_students_slot(_name))
for _name in ("mixup", "cutmix"):
    register_method(_name, teacher=False, student=True, unlabelled=False, loss=_name)(_on_the_students_slot(_name))


@register_method("teacher_warmup", teacher=True, student=False, loss=CONFIGURED)
def teacher_warmup_step(state: State, batch: Batch) -> StepMetrics:
    """The teacher's training loss on its slot: the phase before MPL or pseudo labels."""
    return _train(state, batch, "teacher", loss=state.method.teacher_loss)


@register_method("pseudo_label", teacher=True, student=True)
def pseudo_label_step(state: State, batch: Batch) -> StepMetrics:
    """Equation 1: the student learns the argmax labels of a fixed teacher where it is confident (Table 6)."""
    return _taught_by_a_fixed_teacher(state, batch, soft=False)


@register_method("noisy_student", teacher=True, student=True)
def noisy_student_step(state: State, batch: Batch) -> StepMetrics:
    """The same with whole distributions (Table 11); the noise is dropout, drop-path and the strong view."""
    return _taught_by_a_fixed_teacher(state, batch, soft=True)


def _taught_by_a_fixed_teacher(state: State, batch: Batch, *, soft: bool) -> StepMetrics:
    method, student, measured, now = state.method, state.student, list[Metrics](), state.schedules.at(state.step)
    assert student is not None
    teachers: list[torch.Tensor] = []
    for part in batch.split(state.micro_batches):
        probabilities = _fixed_teacher(state, part)  # [U, K]
        teachers.append(probabilities.log())
        confidence, labels = probabilities.max(-1)  # [U], int64 [U]
        targets = probabilities if soft else labels
        confident = confidence >= method.pseudo_label_threshold  # bool [U]
        rows = torch.cat([part.unlabelled_rows + STRONG_ROWS, part.labelled_rows + LABELLED_ROWS])  # int64 [U + B]
        images = part.normalise(torch.cat([part.strong, part.labelled]))  # [U + B, ...]
        logits = student.forward(images, state.new_pass(STUDENT_PASS, rows))
        strong, labelled = logits.split([len(part.strong), len(part.labelled)])  # [U, K], [B, K]
        pseudo = (cross_entropy(strong, targets, smoothing=method.student_label_smoothing) * confident).mean()  # []
        supervised = cross_entropy(labelled, part.labels, smoothing=method.label_smoothing).mean()  # []
        student.accumulate((pseudo + method.supervised_weight * supervised) / state.micro_batches)
        measured.append(
            {
                "student_loss": pseudo.detach(),
                "student_supervised_loss": supervised.detach(),
                "student_accuracy": accuracy(labelled, part.labels),
                "confident": confident.float().mean(),
            }
        )
    state.note_labels(teachers)
    _update(state, student, lr=now.student_lr)
    return {**means(measured), "student_lr": now.student_lr}


@torch.no_grad()
def _fixed_teacher(state: State, batch: Batch) -> torch.Tensor:
    """The teacher's probabilities on x_u [U, K]: those stored, or of the network in evaluation mode."""
    if batch.unlabelled_distributions is not None:
        return batch.unlabelled_distributions
    teacher = state.teacher
    assert teacher is not None
    pass_ = state.new_pass(TEACHER_PASS, batch.unlabelled_rows + WEAK_ROWS, learn=False, dropout=False)
    teacher.module.eval()
    logits = teacher.forward(batch.normalise(batch.weak), pass_)  # [U, K]
    teacher.module.train()
    return logits.softmax(-1)


def _train(state: State, batch: Batch, name: Literal["teacher", "student"], *, loss: str) -> StepMetrics:
    """A step of one network on [x_l, x_u, x_s] as one batch by a training loss.

    One that adapts to the whole batch sees micro-batches twice: the first time without a graph.
    """
    training_loss, measured, now = LOSSES[loss](), list[Metrics](), state.schedules.at(state.step)
    if name == "teacher":
        network, number, look, lr = state.teacher, TEACHER_PASS, state.teacher_views, now.teacher_lr
    else:
        network, number, look, lr = state.student, STUDENT_PASS, three_views, now.student_lr
    assert network is not None

    def views(part: Batch, *, learn: bool = True) -> Logits:
        return state.view_logits(network, number, look(part, training_loss.images(state, part)), learn=learn)

    parts, weak = batch.split(state.micro_batches), list[torch.Tensor]()
    twice = training_loss.adapts and len(parts) > 1
    if twice:
        with torch.no_grad():
            training_loss.adapt(state, parts, [views(part) for part in parts])
    for part in parts:
        logits = views(part, learn=not twice)
        if training_loss.adapts and not twice:
            training_loss.adapt(state, parts, [logits])
        weak.append(logits.weak.detach())
        total, found = training_loss(state, part, logits, weight=now.uda_weight)  # []
        network.accumulate(total / state.micro_batches)
        measured.append({f"{name}_{key}": value for key, value in {"loss": total.detach(), **found}.items()})
    state.note_labels(weak)
    _update(state, network, lr=lr)
    return {**means(measured), f"{name}_lr": lr}


def _update(state: State, network: Network, *, lr: torch.Tensor) -> None:
    """End a step of one network: apply the accumulated gradient at lr [], advance."""
    network.reduce()
    network.apply(lr)
    state.advance()
