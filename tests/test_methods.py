"""The baselines and the teachers of Tables 7, 10 and 11, against their formulas: tiny MLP, float64, no batch norm."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpl_scale.config.schema import UDAConfig
from mpl_scale.mpl import LOSSES, METHODS
from mpl_scale.mpl.losses import where_unsure
from mpl_scale.mpl.mixing import beta, cutmix_box
from mpl_scale.mpl.views import stored_views
from mpl_scale.philox import uniform
from mpl_scale.types import Batch
from tests.support.perceptrons import CLASSES, FEATURES, flat, gradient, make_batch, make_state, teacher_gradient

ALMOST = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums of a few terms in another order


def student_gradient(method: str, batch: Batch, **settings: object) -> tuple[torch.Tensor, torch.nn.Module]:
    """What one step of a baseline moves the student by at learning rate 1, and its network before."""
    state = make_state("none", lr=1.0, name=method, **settings)
    before = flat(state.student.module)
    METHODS[method].step(state, batch)
    return before - flat(state.student.module), make_state("none").student.module


# ---- mixup and cutmix


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    count = 20_000
    sample = beta(alpha, torch.from_numpy(np.random.default_rng(0).uniform(size=(count, 128)))).numpy()
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); four standard errors of the mean and of the variance
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(sample.mean() - 0.5) < 4 * math.sqrt(variance / count)
    assert abs(sample.var() - variance) < 4 * variance * math.sqrt(2 / count)
    # its density near 0 goes as x^(a - 1) / B(a, a): P(x < e) = e^a / (a B(a, a)) to first order
    edge = 0.01
    expected = edge**alpha / (alpha * math.gamma(alpha) ** 2 / math.gamma(2 * alpha))
    assert abs((sample < edge).mean() / expected - 1) < 0.03 + 4 / math.sqrt(count * expected)


def test_small_alphas_do_not_underflow() -> None:
    sample = beta(0.001, torch.from_numpy(np.random.default_rng(0).uniform(size=(1000, 128)))).numpy()
    assert np.isfinite(sample).all()
    assert abs((sample > 0.5).mean() - 0.5) < 0.07  # binomial: standard deviation 0.016


def drawn_weight(rows: torch.Tensor, *, step: int = 0) -> torch.Tensor:
    numbers = uniform(seed=0, stream=4 << 16, step=torch.tensor(step), rows=rows[::2] // 2, columns=128)
    return beta(1.0, numbers).repeat_interleave(2)


LOGITS = torch.zeros(16, CLASSES, dtype=torch.float64)


def image_batch() -> Batch:
    images = torch.rand(16, 3, 12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return replace(make_batch(labelled=16), labelled=images, labels=torch.arange(16) % CLASSES)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_mix_is_the_same_in_any_micro_batches_and_drawn_anew_at_each_step(name: str) -> None:
    state, batch, loss = make_state("none"), image_batch(), LOSSES[name]()
    for mixed in (loss.images, lambda state, batch: loss.targets(state, batch, LOGITS[: len(batch.labels)])):
        whole = mixed(state, batch)
        assert torch.equal(torch.cat([mixed(state, part) for part in batch.split(4)]), whole)
        state.step.add_(1)
        assert not torch.equal(mixed(state, batch), whole)


def test_cutmix_pastes_one_box_and_weighs_labels_by_its_area() -> None:
    state, batch, loss = make_state("none"), image_batch(), LOSSES["cutmix"]()
    mixed, targets = loss.images(state, batch), loss.targets(state, batch, LOGITS)
    one_hot = F.one_hot(batch.labels, CLASSES).double()
    weights = drawn_weight(batch.labelled_rows)
    for row, weight in enumerate(weights.tolist()):
        pasted = (mixed[row] != batch.labelled[row]).any(0)
        assert torch.equal(mixed[row][:, pasted], batch.labelled[row ^ 1][:, pasted])
        y, x = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(y) * len(x), "one box"
        share = len(y) * len(x) / (12 * 9)
        assert share <= 1 - weight + 1e-12  # clipped and rounded down
        torch.testing.assert_close(targets[row], (1 - share) * one_hot[row] + share * one_hot[row ^ 1], **ALMOST)
    assert 0 < (mixed != batch.labelled).double().mean() < 1


def test_an_unclipped_box_has_the_area_it_was_drawn_for() -> None:
    """The sides' floors lose at most two pixels of each side."""
    state, rows = make_state("none"), torch.arange(400)
    images = torch.zeros(1).expand(400, 3, 100, 100)
    box = cutmix_box(state, replace(make_batch(labelled=400), labelled=images))
    area, drawn = box.double().mean((1, 2, 3)), 1 - drawn_weight(rows)
    inside = ~(box[:, 0, 0].any(1) | box[:, 0, -1].any(1) | box[:, 0, :, 0].any(1) | box[:, 0, :, -1].any(1))
    assert inside.sum() > 40  # a centre is uniform, half a side below 1/2: an eighth or so of the boxes
    assert ((drawn - area)[inside].abs() <= 4 / 100).all()


def test_mixup_learns_mixed_labels_from_mixed_images() -> None:
    batch = make_batch(labelled=8)
    moved, network = student_gradient("mixup", batch, supervised_weight=1.0)
    weight = drawn_weight(batch.labelled_rows)[:, None]
    other = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    logits = network(weight * batch.labelled + (1 - weight) * batch.labelled[other])
    first = F.cross_entropy(logits, batch.labels, reduction="none")
    second = F.cross_entropy(logits, batch.labels[other], reduction="none")
    loss = (weight[:, 0] * first + (1 - weight[:, 0]) * second).mean()
    torch.testing.assert_close(moved, gradient(network, loss), **ALMOST)


# ---- uda's two masks


@pytest.mark.parametrize(("unlabelled", "labelled"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.35), (0.5, 0.35)])
def test_uda_leaves_out_unsure_unlabelled_and_sure_labelled_images(unlabelled: float, labelled: float) -> None:
    batch = replace(make_batch(labelled=6, unlabelled=6), strong=torch.randn(6, FEATURES, dtype=torch.float64))
    settings = UDAConfig(weight=0.0, temperature=0.3, threshold=unlabelled, labelled_threshold=labelled)
    state = make_state("none", lr=1.0, name="uda", supervised_weight=1.0, uda=settings)
    state.schedules.uda_weight.fill_(2.0)
    network, before = make_state("none").student.module, flat(state.student.module)
    METHODS["uda"].step(state, batch)
    own = F.cross_entropy(network(batch.labelled), batch.labels, reduction="none")
    kept = own >= -np.log(labelled)  # the probability of the label is at most the threshold
    target = (network(batch.weak).detach() / 0.3).softmax(1)
    consistency = -(target * network(batch.strong).log_softmax(1)).sum(1) * (target.amax(1) >= unlabelled)
    if labelled < 1:
        assert 0 < kept.sum() < 6  # the case is one
    loss = (own * kept).sum() / 6 + 2 * consistency.mean()
    torch.testing.assert_close(before - flat(state.student.module), gradient(network, loss), **ALMOST)


def test_where_unsure_looks_at_the_right_class() -> None:
    """A row sure of a wrong class stays: it has most to learn."""
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0], [0.0, 0.0]])
    assert where_unsure(logits, torch.tensor([0, 1, 0]), threshold=0.9).tolist() == [0, 1, 1]


# ---- teachers of Table 10


OWN_LOSSES = sorted(name for name, loss in LOSSES.items() if not loss.adapts and name != "cutmix")
"""Those that adapt are in test_matching.py; cutmix is of images."""


@pytest.mark.parametrize("loss", OWN_LOSSES)
def test_mpl_without_feedback_trains_its_teacher_by_its_own_loss(loss: str) -> None:
    """What moves the teacher is the gradient of the loss of that name and nothing else."""
    batch = make_batch(labelled=6)
    settings = {"supervised_weight": 1.0, "teacher_loss": loss, "pseudo_label_threshold": 0.35}
    state = make_state("none", **settings)
    state.schedules.uda_weight.fill_(1.0)
    network = make_state("none").teacher.module
    training_loss = LOSSES[loss]()
    views = network(training_loss.images(state, batch)), network(batch.weak), network(batch.strong)
    total, _ = training_loss(state, batch, views, weight=torch.tensor(1.0))
    torch.testing.assert_close(teacher_gradient(state, batch), gradient(network, total), **ALMOST)


def test_a_self_labelling_teacher_learns_its_confident_argmax() -> None:
    batch = make_batch(labelled=2, unlabelled=12)
    state = make_state("none", teacher_loss="pseudo_label", pseudo_label_threshold=0.45, supervised_weight=0.0)
    state.schedules.uda_weight.fill_(1.0)
    network = make_state("none").teacher.module
    confidence, labels = network(batch.weak).softmax(1).detach().max(1)
    assert 0 < (confidence >= 0.45).sum() < 12
    loss = (F.cross_entropy(network(batch.weak), labels, reduction="none") * (confidence >= 0.45)).mean()
    torch.testing.assert_close(teacher_gradient(state, batch), gradient(network, loss), **ALMOST)


# ---- noisy student, and stored distributions


def test_noisy_student_learns_whole_distributions_stored_or_not() -> None:
    batch = make_batch()
    settings = {"pseudo_label_threshold": 0.0, "supervised_weight": 1.0}
    moved, network = student_gradient("noisy_student", batch, **settings)
    probabilities = make_state("none").teacher.module(batch.weak).softmax(1).detach()
    pseudo = -(probabilities * network(batch.strong).log_softmax(1)).sum(1).mean()
    loss = pseudo + F.cross_entropy(network(batch.labelled), batch.labels)
    torch.testing.assert_close(moved, gradient(network, loss), **ALMOST)
    stored = replace(batch, unlabelled_distributions=probabilities)
    again, _ = student_gradient("noisy_student", stored, **settings)
    torch.testing.assert_close(again, moved, **ALMOST)
    other, _ = student_gradient(
        "noisy_student", replace(stored, unlabelled_distributions=probabilities.flip(1)), **settings
    )
    assert not torch.allclose(other, moved)


def with_distributions(batch: Batch) -> Batch:
    """FEATURES numbers for each image, so that the tiny teacher can take them."""
    g = torch.Generator().manual_seed(3)

    def distributions(count: int) -> torch.Tensor:
        return torch.randn(count, FEATURES, generator=g, dtype=torch.float64).softmax(1)

    return replace(
        batch,
        labelled_distributions=distributions(len(batch.labelled)),
        unlabelled_distributions=distributions(len(batch.weak)),
    )


@pytest.mark.parametrize("rule", ["none", "cosine", "per_sample"])
def test_reduced_mpl_is_mpl_whose_teacher_sees_the_distributions(rule: str) -> None:
    """Put in the images' place, they give plain MPL the same teacher and, with the strong view apart, the student."""
    batch = with_distributions(make_batch())
    settings = {"supervised_weight": 1.0, "teacher_loss": "supervised"}
    reduced = make_state(rule, lr=0.25, teacher_lr=0.5, name="reduced_mpl", **settings)  # exact in float32
    reduced.teacher_views = stored_views
    METHODS["reduced_mpl"].step(reduced, batch)
    network = make_state(rule).teacher.module
    with torch.no_grad():
        logits = network(batch.unlabelled_distributions)
    numbers = uniform(seed=0, stream=3 << 16, step=torch.tensor(0), rows=batch.unlabelled_rows + (1 << 28), columns=3)
    labels = (logits.log_softmax(1) - torch.log(-torch.log(numbers))).argmax(1)
    student = make_state(rule).student.module
    loss = F.cross_entropy(student(batch.strong), labels)
    expected = flat(student) - 0.25 * gradient(student, loss)
    torch.testing.assert_close(flat(reduced.student.module), expected, **ALMOST)
    own = F.cross_entropy(network(batch.labelled_distributions), batch.labels)
    moved = (flat(network) - flat(reduced.teacher.module)) / 0.5
    unfed = gradient(network, own)
    assert torch.allclose(moved, unfed, rtol=1e-8) == (rule == "none")


def test_reduced_mpl_without_distributions_says_so() -> None:
    state = make_state("cosine", name="reduced_mpl", teacher_loss="supervised")
    state.teacher_views = stored_views
    with pytest.raises(ValueError, match=r"reduced_mpl learns from stored distributions, and the batch has none"):
        METHODS["reduced_mpl"].step(state, make_batch())


def test_micro_batches_carry_their_distributions() -> None:
    batch = with_distributions(make_batch(labelled=4, unlabelled=4))
    parts = batch.split(2)
    assert torch.equal(parts[1].labelled_distributions, batch.labelled_distributions[2:])
    assert parts[0].tensors().keys() == batch.tensors().keys()
    assert make_batch().tensors().keys().isdisjoint({"labelled_distributions", "unlabelled_distributions"})
    assert CLASSES == 3
