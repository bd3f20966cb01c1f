"""What must hold of the method whatever the implementation: tiny MLP, float64, no batch norm (FIDELITY 5)."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpl_scale.config.schema import FeedbackConfig, OptimConfig
from mpl_scale.engine.flat_engine import FlatNetwork
from mpl_scale.mesh import build_mesh
from mpl_scale.mpl import FEEDBACK_RULES, METHODS, State
from mpl_scale.mpl.feedback import Cosine, PerSample, SoftExact, StudentUpdate, cosine, labelled_gradient
from mpl_scale.mpl.losses import cross_entropy, sample_labels
from mpl_scale.mpl.state import gradient_dots
from mpl_scale.philox import uniform
from mpl_scale.types import Batch
from tests.support.perceptrons import (
    CLASSES,
    CPU,
    flat,
    gradient,
    make_batch,
    make_state,
    mlp,
    network,
    teacher_gradient,
)
from tests.support.ranks import pool


def sampled(state: State, batch: Batch) -> torch.Tensor:
    """The labels the next step will draw."""
    with torch.no_grad():
        logits = state.teacher.module(batch.weak)
    numbers = uniform(seed=0, stream=3 << 16, step=state.step, rows=batch.unlabelled_rows + (1 << 28), columns=CLASSES)
    return sample_labels(logits, numbers)


SMOOTHINGS = (0.0, 0.1, 0.15)
"""None, Table 8's and the released code's."""


def unrolled(
    teacher: nn.Module, student: nn.Module, batch: Batch, lr: float, *, smoothing: float = 0.0
) -> torch.Tensor:
    """L_l(theta_S - lr grad CE(T(x_u), S(x_u))) of equation 3 with a smoothed target, differentiable in the teacher."""
    weights = dict(student.named_parameters())
    logits = torch.func.functional_call(student, weights, (batch.weak,))
    target = (1 - smoothing) * teacher(batch.weak).softmax(-1) + smoothing / CLASSES
    loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    stepped = {name: w - lr * g for (name, w), g in zip(weights.items(), grads, strict=True)}
    return F.cross_entropy(torch.func.functional_call(student, stepped, (batch.labelled,)), batch.labels)


def test_property_1_loss_difference_is_lr_times_the_dot_product_to_first_order() -> None:
    errors = []
    for lr in (1e-1, 1e-2, 1e-3, 1e-4):
        state, batch = make_state("loss_difference", lr=lr), make_batch()
        module = state.student.module
        labels = sampled(state, batch)
        g_u = gradient(module, F.cross_entropy(module(batch.weak), labels))
        g_l = gradient(module, F.cross_entropy(module(batch.labelled), batch.labels))
        h = METHODS["mpl"].step(state, batch)["feedback"]
        errors.append(abs(h / (lr * torch.dot(g_l, g_u)) - 1).item())
    assert errors[0] < 0.5
    assert all(later < earlier / 5 for earlier, later in itertools.pairwise(errors)), errors  # O(lr)


@pytest.mark.parametrize(
    ("forward_mode", "tolerance"),
    [(True, 1e-9), (False, 1e-4)],  # a central difference with a relative step of 1e-3 is off by its square
)
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_property_2_soft_exact_is_autograd_through_the_unrolled_step(
    smoothing: float, forward_mode: bool, tolerance: float
) -> None:
    lr, batch = 0.125, make_batch()  # a rate that float32, as schedules are, holds exactly
    settings = {"pseudo_labels": "soft", "student_label_smoothing": smoothing}
    state = make_state("soft_exact", lr=lr, forward_mode=forward_mode, **settings)
    teacher, student = mlp(1), mlp(2)
    exact = gradient(teacher, unrolled(teacher, student, batch, lr, smoothing=smoothing))
    target = (1 - smoothing) * teacher(batch.weak).softmax(-1).detach() + smoothing / CLASSES
    g_u = gradient(student, F.cross_entropy(student(batch.weak), target))
    ours = teacher_gradient(state, batch)
    with torch.no_grad():
        for p, w in zip(student.parameters(), state.student.module.parameters(), strict=True):
            p.copy_(w)
    g_l = gradient(student, F.cross_entropy(student(batch.labelled), batch.labels))
    scaled = lr * g_u.norm() * g_l.norm() * ours  # the rule divides by both norms, as the cosine does
    torch.testing.assert_close(scaled, exact, rtol=tolerance, atol=0.01 * tolerance * exact.abs().max().item())


def expected_teacher_gradient(
    state: State, batch: Batch, offset: float, lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over all K**U label vectors of P * (h - offset) * grad CE(y, T), and the same without h (offset 1)."""
    teacher, student = state.teacher.module, state.student.module
    weights = list(student.parameters())
    log_probabilities = teacher(batch.weak).log_softmax(-1)
    g_l = gradient(student, F.cross_entropy(student(batch.labelled), batch.labels))
    logits = student(batch.weak)

    def label_gradient(row: int, label: int) -> torch.Tensor:
        loss = -logits.log_softmax(-1)[row, label]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])

    per_label = [[label_gradient(i, k) for k in range(CLASSES)] for i in range(len(batch.weak))]
    total = torch.zeros_like(flat(teacher))
    for labels in itertools.product(range(CLASSES), repeat=len(batch.weak)):
        g_u = sum(per_label[i][k] for i, k in enumerate(labels)) / len(labels)
        h = lr * torch.dot(g_l, g_u)
        ce = -sum(log_probabilities[i, k] for i, k in enumerate(labels)) / len(labels)
        probability = sum(log_probabilities[i, k] for i, k in enumerate(labels)).exp().detach()
        total += (
            probability
            * (h - offset)
            * torch.cat([g.flatten() for g in torch.autograd.grad(ce, list(teacher.parameters()), retain_graph=True)])
        )
    return total, g_l


def test_properties_3_and_5_the_expectation_over_labels_is_the_exact_gradient_and_ignores_a_baseline() -> None:
    """With the batch-MEAN CE the expectation is exactly 1 / U of the gradient at theta (first order in lr)."""
    lr, batch = 1.0, make_batch(unlabelled=3)
    state = make_state("dot", lr=lr)
    teacher, student = state.teacher.module, state.student.module
    summed, g_l = expected_teacher_gradient(state, batch, 0.0, lr)
    probabilities = teacher(batch.weak).softmax(-1)
    soft = cross_entropy(student(batch.weak), probabilities).mean()
    g_u = torch.cat([g.flatten() for g in torch.autograd.grad(soft, list(student.parameters()), create_graph=True)])
    exact = gradient(teacher, -lr * torch.dot(g_l, g_u))  # d/d theta_T of L_l to first order
    torch.testing.assert_close(summed * len(batch.weak), exact, rtol=1e-10, atol=1e-12)
    with_baseline, _ = expected_teacher_gradient(state, batch, 0.37, lr)
    torch.testing.assert_close(with_baseline, summed, rtol=1e-10, atol=1e-12)
    # argmax labels are no expectation: there a baseline changes the gradient
    labels = probabilities.argmax(-1)
    shift = gradient(teacher, 0.37 * F.cross_entropy(teacher(batch.weak), labels))
    assert shift.norm() > 0.01 * summed.norm()


def test_property_3_sampling_follows_the_teacher() -> None:
    """Frequencies of sampled labels are the teacher's probabilities: 5 standard deviations of 20,000 draws."""
    logits = torch.tensor([[0.3, -1.0, 1.2]]).expand(20000, 3)
    draws = uniform(seed=1, stream=2, step=torch.tensor(7), rows=torch.arange(20000), columns=3)
    frequency = torch.bincount(sample_labels(logits, draws), minlength=3) / 20000
    expected = logits[0].softmax(-1)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / 20000).sqrt()).all()


def test_property_4_h_at_the_sampled_update_is_biased_by_order_lr() -> None:
    relative = []
    for lr in (0.5, 0.05, 0.005):
        state, batch = make_state("dot", lr=lr), make_batch()
        module = state.student.module
        labels = sampled(state, batch)
        g_u = gradient(module, F.cross_entropy(module(batch.weak), labels))
        at_theta = lr * torch.dot(gradient(module, F.cross_entropy(module(batch.labelled), batch.labels)), g_u)
        h = METHODS["mpl"].step(state, batch)["feedback"]
        relative.append(abs(h / at_theta - 1).item())
    assert relative[0] > 1e-3
    assert relative[1] < relative[0] / 5
    assert relative[2] < relative[1] / 5


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("lr", [0.0, 0.3])
def test_property_6_per_sample_credits_average_to_the_cosine(lr: float, smoothing: float) -> None:
    """The mean of the credits is cos(g_u, g_l), g_u the gradient of the smoothed loss that the student descends."""
    state = make_state("per_sample", lr=lr, student_label_smoothing=smoothing)
    batch, captured = make_batch(), {}

    class Recorder(FEEDBACK_RULES["per_sample"]):  # type: ignore[misc]
        def after_update(self, *args: object) -> object:
            captured["signal"] = super().after_update(*args)
            return captured["signal"]

    FEEDBACK_RULES["recorder"] = Recorder
    try:
        feedback = FeedbackConfig(rule="recorder", baseline=False)
        state.method = state.method.model_copy(update={"feedback": feedback})
        h = METHODS["mpl"].step(state, batch)["feedback"]
    finally:
        del FEEDBACK_RULES["recorder"]
    credit = captured["signal"].credit
    assert credit.std() > 1e-3
    # A central difference with a relative step of 1e-3 is off by its square.
    torch.testing.assert_close(credit.mean(), h, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_property_6_the_expectation_of_per_sample_over_labels_is_the_exact_gradient(smoothing: float) -> None:
    """Sum over every row's labels of P * credit * grad CE is the gradient of -<g_l, g_u(theta_T)>, as soft_exact's."""
    batch, teacher, student = make_batch(), mlp(1), mlp(2)
    weights = list(student.parameters())
    g_l = torch.autograd.grad(F.cross_entropy(student(batch.labelled), batch.labels), weights)
    names = [name for name, _ in student.named_parameters()]

    def log_probabilities(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(student, values, (batch.weak,)).log_softmax(-1)

    at, along = dict(zip(names, weights, strict=True)), dict(zip(names, g_l, strict=True))
    derivative = torch.func.jvp(log_probabilities, (at,), (along,))[1].detach()  # D, [U, K]
    logits = teacher(batch.weak)
    expected = torch.zeros(())
    probabilities = logits.softmax(-1).detach()

    def update(targets: torch.Tensor) -> StudentUpdate:
        return StudentUpdate(targets, smoothing, [], torch.tensor(1.0), forward=lambda: logits)

    for label in range(CLASSES):
        targets = torch.full((len(batch.weak),), label)
        credit = PerSample()._credit(derivative, update(targets))
        expected = expected + (probabilities[:, label] * credit * cross_entropy(logits, targets)).mean()
    soft = SoftExact()
    credits = soft._credit(derivative, update(probabilities))
    exact = soft.teacher_loss(credits, logits, probabilities, strong=logits)
    target = (1 - smoothing) * logits.softmax(-1) + smoothing / CLASSES
    g_u = torch.autograd.grad(cross_entropy(student(batch.weak), target).mean(), weights, create_graph=True)
    true = -sum((a * b).sum() for a, b in zip(g_l, g_u, strict=True))
    by_autograd, by_soft, by_labels = (gradient(teacher, loss) for loss in (true, exact, expected))
    torch.testing.assert_close(by_soft, by_autograd, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(by_labels, by_autograd, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_property_7_cosine_has_the_sign_of_the_dot_is_bounded_and_ignores_scale(smoothing: float) -> None:
    values = {}
    for rule in ("cosine", "dot", "flipped"):
        state = make_state(rule, student_label_smoothing=smoothing)
        values[rule] = METHODS["mpl"].step(state, make_batch())["feedback"].item()
    assert abs(values["cosine"]) <= 1
    assert values["cosine"] * values["dot"] > 0
    assert values["flipped"] == -values["cosine"]
    state, batch, student = make_state("cosine", lr=0.0, student_label_smoothing=smoothing), make_batch(), mlp(2)
    target = (1 - smoothing) * F.one_hot(sampled(state, batch), CLASSES).double() + smoothing / CLASSES
    g_u = gradient(student, F.cross_entropy(student(batch.weak), target))
    g_l = gradient(student, F.cross_entropy(student(batch.labelled), batch.labels))
    h = METHODS["mpl"].step(state, batch)["feedback"]
    torch.testing.assert_close(h, F.cosine_similarity(g_u, g_l, dim=0), rtol=1e-10, atol=0)
    u, v = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    network_ = network(2)
    first = cosine(gradient_dots([u], [v], network_))
    torch.testing.assert_close(cosine(gradient_dots([1e-6 * u], [1e5 * v], network_)), first, rtol=1e-12, atol=0)
    assert cosine(gradient_dots([0 * u], [v], network_)) == 0


def test_property_8_a_small_teacher_step_lowers_the_unrolled_objective_by_its_squared_gradient() -> None:
    lr, batch = 0.1, make_batch()
    state = make_state("soft_exact", lr=lr, pseudo_labels="soft")
    direction = teacher_gradient(state, batch)
    teacher, student = mlp(1), mlp(2)
    loss = unrolled(teacher, student, batch, lr)
    exact = gradient(teacher, loss)
    size = 1e-4 / direction.norm()
    parameters = list(teacher.parameters())
    pieces = direction.split([p.numel() for p in parameters])
    with torch.no_grad():
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter -= size * piece.view_as(parameter)
    drop = loss - unrolled(teacher, student, batch, lr)
    torch.testing.assert_close(drop, size * torch.dot(exact, direction), rtol=1e-3, atol=0)
    cosine_similarity = torch.dot(exact, direction) / exact.norm() / direction.norm()
    assert cosine_similarity > 1 - 1e-6


def test_property_9_a_student_that_does_not_move_gives_no_loss_difference() -> None:
    assert METHODS["mpl"].step(make_state("loss_difference", lr=0.0), make_batch())["feedback"] == 0


def sharded_cosine() -> float:
    """The cosine over ranks that hold four rows each and half of every gradient."""
    mesh = build_mesh(device=CPU)
    student = FlatNetwork(mlp(2), optim=OptimConfig(lr=1.0, momentum=0.0, nesterov=False), mesh=mesh)
    batch = make_batch(labelled=8, unlabelled=8)
    mine = slice(mesh.data_index * 4, mesh.data_index * 4 + 4)
    student.accumulate(F.cross_entropy(student.forward(batch.weak[mine]), batch.labels[mine]))
    u = [s.clone() for s in student.reduce()]
    student.discard()
    student.accumulate(F.cross_entropy(student.forward(batch.labelled[mine]), batch.labels[mine]))
    v = student.reduce()
    return float(cosine(gradient_dots(u, v, student)))


def plain_cosine(rows: slice) -> float:
    module, batch = mlp(2), make_batch(labelled=8, unlabelled=8)
    u = gradient(module, F.cross_entropy(module(batch.weak[rows]), batch.labels[rows]))
    v = gradient(module, F.cross_entropy(module(batch.labelled[rows]), batch.labels[rows]))
    return (torch.dot(u, v) / u.norm() / v.norm()).item()


def test_property_10_the_sharded_cosine_is_that_of_the_whole_batch_and_not_the_mean_of_local_ones() -> None:
    whole = plain_cosine(slice(0, 8))
    for value in pool(2).run(sharded_cosine):
        assert abs(value - whole) < 1e-12
    assert abs((plain_cosine(slice(0, 4)) + plain_cosine(slice(4, 8))) / 2 - whole) > 1e-3


def test_property_11_soft_labels_do_reach_the_teacher() -> None:
    """The released code's MPL term had no gradient at all."""
    assert teacher_gradient(make_state("soft_exact", pseudo_labels="soft"), make_batch()).norm() > 1e-4


@pytest.mark.parametrize("rule", ["cosine", "per_sample"])
def test_feedback_leaves_no_gradient_and_does_not_move_the_student(rule: str) -> None:
    """The next update is that of a student that never computed feedback."""
    with_feedback, without = make_state(rule), make_state("none")
    for step in range(3):
        for state in (with_feedback, without):
            METHODS["mpl"].step(state, make_batch(seed=step))
    assert torch.equal(flat(with_feedback.student.module), flat(without.student.module))


def test_labelled_gradient_is_taken_at_the_updated_student() -> None:
    state, batch = make_state("cosine", lr=0.3), make_batch()
    seen = {}

    class Spy(Cosine):
        def after_update(self, state: State, batch: Batch, update: object) -> object:
            gradient_shard, _, _ = labelled_gradient(state, batch, update)  # type: ignore[arg-type]
            seen["g_l"] = torch.cat(list(gradient_shard)).clone()
            seen["weights"] = [p.detach().clone() for p in state.student.module.parameters()]
            return super().after_update(state, batch, update)  # type: ignore[arg-type]

    FEEDBACK_RULES["spy"] = Spy
    try:
        state.method = state.method.model_copy(update={"feedback": FeedbackConfig(rule="spy", baseline=False)})
        METHODS["mpl"].step(state, batch)
    finally:
        del FEEDBACK_RULES["spy"]
    module = mlp(2)
    assert not torch.equal(flat(module), torch.cat([w.flatten() for w in seen["weights"]]))
    with torch.no_grad():
        for p, w in zip(module.parameters(), seen["weights"], strict=True):
            p.copy_(w)
    expected = gradient(module, F.cross_entropy(module(batch.labelled), batch.labels))
    pieces = list(zip(module.parameters(), expected.split([p.numel() for p in module.parameters()]), strict=True))
    decayed_first = [g for p, g in pieces if p.ndim > 1] + [g for p, g in pieces if p.ndim == 1]  # the engine's layout
    expected = torch.cat(decayed_first)
    torch.testing.assert_close(seen["g_l"], expected, rtol=1e-12, atol=1e-14)
