"""benchmarks/through_optimizer.py: its derivatives are first-order exact, and its steps are the optimisers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import through_optimizer
from benchmarks.paired import Kept
from benchmarks.through_optimizer import STUDENTS, Learner, Seen, correlations, student_step
from mpl_scale.config.schema import OptimConfig


def step_of(config: OptimConfig, lr: float, *, before: int = 0) -> tuple[Seen, Learner]:
    """What a step shows after some others; the same inputs each time."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(12, 64, dtype=torch.float64, generator=generator), torch.arange(12) % 10
    own = torch.randn(8, 64, dtype=torch.float64, generator=generator), torch.arange(8)
    learner = Learner(config, seed=0)
    for _ in range(before):
        student_step(learner, x, labels.flip(0), own, config.lr)
    return student_step(learner, x, labels, own, lr), learner


@pytest.mark.parametrize("name", STUDENTS)
def test_through_is_the_drop_to_first_order(name: str) -> None:
    """drop / through -> 1 with an error of O(lr); plain's does not where the optimiser is not plain SGD."""
    errors = [
        abs(step_of(STUDENTS[name], lr)[0].drop / step_of(STUDENTS[name], lr)[0].through - 1) for lr in (1e-3, 1e-4)
    ]
    assert errors[1] < 0.12 * errors[0] < 0.12
    seen = step_of(STUDENTS[name], 1e-4)[0]
    plain = abs(seen.drop / seen.plain - 1)
    assert (plain > 0.02) == (name != "SGD")


def test_plain_and_through_are_one_without_an_optimiser() -> None:
    config = STUDENTS["SGD"].model_copy(update={"weight_decay": 0.0})
    generator = torch.Generator().manual_seed(0)
    x, own = torch.randn(9, 64, dtype=torch.float64, generator=generator), (torch.ones(3, 64).double(), torch.arange(3))
    learner = Learner(config, seed=1)
    learner.optimizer.param_groups[0]["weight_decay"] = 0.0
    seen = student_step(learner, x, torch.arange(9), own, 0.1)
    assert seen.through == pytest.approx(seen.plain, rel=1e-9)
    assert seen.cosines["through"] == pytest.approx(seen.cosines["plain"], rel=1e-9)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_step_can_be_taken_back(name: str) -> None:
    _, learner = step_of(STUDENTS[name], 0.01, before=3)
    saved, x, own = learner.saved(), torch.ones(4, 64).double(), (torch.ones(3, 64).double(), torch.arange(3))
    first = student_step(learner, x, torch.arange(4), own, 0.01)
    learner.restore(saved)
    assert student_step(learner, x, torch.arange(4), own, 0.01) == first


def test_correlations_are_numpys() -> None:
    steps = [Seen(1, 1, -1, {}), Seen(2, 2, -2, {}), Seen(3, 3, -3, {})]
    found = correlations(steps, [steps, steps])
    assert found == pytest.approx(
        {
            "run, plain": 1,
            "run, through": -1,
            "sign, plain": 1,
            "sign, through": 0,
            "labels, plain": 1,
            "labels, through": -1,
        }
    )


def test_rules_differ_and_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(through_optimizer, "STEPS", 12)
    kept = Kept(tmp_path / "kept.jsonl")
    (name, *_) = through_optimizer.TRAINED
    found = {rule: through_optimizer.trained(kept, name, rule, seeds=2) for rule in through_optimizer.RULES}
    assert len({tuple(values) for values in found.values()}) > 1
    assert all(0 <= value <= 100 for values in found.values() for value in values)
    assert -1 <= through_optimizer.measured(kept, name, seeds=1)["labels, through"] <= 1
