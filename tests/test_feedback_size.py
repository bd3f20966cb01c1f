"""How large soft_exact's feedback is: in proportion to what, and what does not change it. Perceptrons in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mpl_scale.config.schema import FeedbackConfig
from mpl_scale.types import Batch
from tests.support.perceptrons import gradient, make_batch, make_state, mlp, teacher_gradient

SMOOTHINGS = (0.0, 0.1, 0.6)
EVERY = pytest.mark.parametrize("normalise", ["norms", "credits"])


def fed_back(batch: Batch, normalise: str, *, smoothing: float = 0.0, sure: float = 1.0) -> torch.Tensor:
    """The teacher's gradient, of feedback alone. sure: multiplies the teacher's weights."""
    feedback = FeedbackConfig(rule="soft_exact", normalise=normalise)  # type: ignore[arg-type]
    settings = {"feedback": feedback, "pseudo_labels": "soft", "student_label_smoothing": smoothing}
    state = make_state("soft_exact", lr=0.0, **settings)  # lr 0: g_l is taken at the same student whatever g_u is
    with torch.no_grad():
        for shard in state.teacher.master:
            shard.mul_(sure)
    state.teacher.refresh_weights()
    return teacher_gradient(state, batch)


def repeated(batch: Batch, times: int) -> Batch:
    """Each image several times, in rows of its own."""
    many = {name: torch.cat([tensor] * times) for name, tensor in batch.tensors().items()}
    rows = {name: torch.arange(len(tensor)) for name, tensor in many.items() if name.endswith("rows")}
    return dataclasses.replace(batch, **{**many, **rows})


@EVERY
def test_a_batch_that_holds_each_image_more_often_gives_the_same_gradient(normalise: str) -> None:
    """All is averaged over rows, nothing summed."""
    batch = make_batch()
    torch.testing.assert_close(
        fed_back(repeated(batch, 5), normalise, smoothing=0.1),
        fed_back(batch, normalise, smoothing=0.1),
        rtol=1e-11,  # some hundred roundings of 1e-16, and cancellation
        atol=1e-14,
    )


def test_only_credits_of_unit_size_do_not_depend_on_smoothing() -> None:
    """The norm |g_u| holds the gradient of the uniform part, which the teacher cannot move; their own size does not."""
    batch = make_batch()
    whole, *smoothed = (fed_back(batch, "credits", smoothing=s) for s in SMOOTHINGS)
    for found in smoothed:
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-14)
    by_norms = [fed_back(batch, "norms", smoothing=s).norm() for s in SMOOTHINGS]
    assert by_norms[2] < 0.8 * by_norms[0]


@pytest.mark.parametrize(("labelled", "unlabelled"), [(5, 4), (40, 64)])
def test_credits_have_unit_size(labelled: int, unlabelled: int) -> None:
    """The gradient of mean_i sum_k p_ik D_ik / sqrt(mean_i Var_k D_ik), with D by torch's own derivative."""
    batch, teacher, student = make_batch(labelled, unlabelled), mlp(1), mlp(2)
    weights = dict(student.named_parameters())
    g_l = torch.autograd.grad(F.cross_entropy(student(batch.labelled), batch.labels), list(weights.values()))

    def log_probabilities(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(student, values, (batch.weak,)).log_softmax(-1)

    d = torch.func.jvp(log_probabilities, (weights,), (dict(zip(weights, g_l, strict=True)),))[1].detach()
    p = teacher(batch.weak).softmax(-1)
    spread = (p * d.square()).sum(-1) - (p * d).sum(-1).square()  # [U]
    expected = gradient(teacher, (p * d).sum(-1).mean()) / spread.mean().sqrt().detach()
    torch.testing.assert_close(fed_back(batch, "credits"), expected, rtol=1e-10, atol=1e-13)
    by_norms = fed_back(batch, "norms")
    assert F.cosine_similarity(by_norms, expected, dim=0) > 1 - 1e-12


@pytest.mark.parametrize("sure", [30.0, 1e4])
def test_a_teacher_that_is_sure_hears_little_or_nothing(sure: float) -> None:
    """Probabilities of 1e-10, and of 0: no division by a spread of 0, and no rounding made large."""
    found = fed_back(make_batch(), "credits", sure=sure)
    assert found.isfinite().all()
    assert found.norm() < fed_back(make_batch(), "credits").norm()
    assert (found == 0).all() == (sure == 1e4)
