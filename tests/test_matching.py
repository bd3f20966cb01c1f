"""Teachers with hard labels and thresholds, against their papers' formulas: tiny MLP, float64, no batch norm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mpl_scale.mpl import METHODS
from mpl_scale.types import Batch
from tests.support.perceptrons import FEATURES, flat, gradient, make_batch, make_state, teacher_gradient

ALMOST = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums of a few terms in another order
WEIGHT, SUPERVISED = 2.0, 0.5


def two_views(unlabelled: int = 12, seed: int = 0) -> Batch:
    """Its views differ."""
    generator = torch.Generator().manual_seed(100 + seed)
    strong = torch.randn(unlabelled, FEATURES, generator=generator, dtype=torch.float64)
    return replace(make_batch(labelled=6, unlabelled=unlabelled, seed=seed), strong=strong)


# ---- FixMatch


@pytest.mark.parametrize("slot", ["student", "teacher"])
@pytest.mark.parametrize("threshold", [0.0, 0.45, 1.0])
def test_fixmatch_is_equation_4(slot: str, threshold: float) -> None:
    """l_u = 1 / (mu B) sum_b 1(max q_b >= tau) H(argmax q_b, p(y | A(u_b))), with q_b = p(y | alpha(u_b))."""
    batch, settings = two_views(), {"pseudo_label_threshold": threshold, "supervised_weight": SUPERVISED}
    if slot == "student":
        state = make_state("none", lr=1.0, name="fixmatch", **settings)
    else:
        state = make_state("none", teacher_loss="fixmatch", **settings)
    state.schedules.uda_weight.fill_(WEIGHT)
    network = getattr(make_state("none"), slot).module
    total, confident = torch.zeros((), dtype=torch.float64), 0
    for weak, strong in zip(batch.weak, batch.strong, strict=True):
        q = network(weak).detach().softmax(0)
        if q.max() >= threshold:
            total, confident = total - network(strong).log_softmax(0)[q.argmax()], confident + 1
    assert {0.0: confident == 12, 0.45: 0 < confident < 12, 1.0: confident == 0}[threshold]
    expected = SUPERVISED * F.cross_entropy(network(batch.labelled), batch.labels) + WEIGHT * total / 12
    if slot == "student":
        before = flat(state.student.module)
        METHODS["fixmatch"].step(state, batch)
        moved = before - flat(state.student.module)
    else:
        moved = teacher_gradient(state, batch)
    torch.testing.assert_close(moved, gradient(network, expected), **ALMOST)
