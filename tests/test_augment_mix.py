"""Mixup and CutMix: the same mix on any number of ranks, from the distributions their papers name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpl_scale.augment.mix import MIXES, MixDraws, beta, cutmix, draw_mix, mixup, soft_targets

ROWS = np.arange(16, dtype=np.int64)


def batch(classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 12, 9, generator=generator, dtype=torch.float64)
    return images, soft_targets(torch.arange(16) % classes, classes, dtype=torch.float64)


def draws(rows: np.ndarray, *, block: int = 2, step: int = 7) -> MixDraws:
    return draw_mix(rows, step=step, seed=3, stream=9, alpha=1.0, block=block)


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("block", [2, 4])
def test_the_mix_does_not_depend_on_the_number_of_ranks(name: str, block: int) -> None:
    images, targets = batch()
    whole = MIXES[name](images, targets, draws(ROWS, block=block))
    for ranks in (2, 4):
        parts = [MIXES[name](images[part], targets[part], draws(part, block=block)) for part in ROWS.reshape(ranks, -1)]
        for index in range(2):
            assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))
    other = MIXES[name](images, targets, draws(ROWS, block=block, step=8))
    assert not torch.equal(whole[0], other[0])


def test_mixup_is_its_formula() -> None:
    images, targets = batch()
    drawn = draws(ROWS)
    mixed, soft = mixup(images, targets, drawn)
    for row, weight in enumerate(drawn.weight):
        other = row ^ 1  # neighbours are exchanged
        assert drawn.partner[row] == other
        torch.testing.assert_close(mixed[row], weight * images[row] + (1 - weight) * images[other])
        torch.testing.assert_close(soft[row], weight * targets[row] + (1 - weight) * targets[other])
    assert (drawn.weight[::2] == drawn.weight[1::2]).all()


def test_cutmix_pastes_one_box_and_weighs_targets_by_its_area() -> None:
    images, targets = batch(classes=16)
    drawn = draws(ROWS)
    mixed, soft = cutmix(images, targets, drawn)
    for row, weight in enumerate(drawn.weight):
        pasted = (mixed[row] != images[row]).any(0)
        assert torch.equal(mixed[row][:, pasted], images[row ^ 1][:, pasted])
        y, x = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(y) * len(x), "one box"
        share = len(y) * len(x) / (12 * 9)
        assert share <= 1 - weight + 1e-12  # clipped and rounded down
        torch.testing.assert_close(soft[row], (1 - share) * targets[row] + share * targets[row ^ 1])
    assert torch.equal(cutmix(images.mul(255).byte(), targets, drawn)[1], soft)


def test_an_unclipped_box_has_the_area_it_was_drawn_for() -> None:
    images, targets = torch.zeros(2, 3, 200, 100), torch.eye(2)
    images[1] = 1
    drawn = MixDraws(np.array([1, 0]), np.array([0.75, 0.75]), np.full((2, 2), 0.5))
    mixed, soft = cutmix(images, targets, drawn)
    assert mixed[0].mean() == 0.25
    assert torch.equal(soft[0], torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    count = 20_000
    sample = beta(alpha, np.random.default_rng(0).uniform(size=(count, 128)))
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); four standard errors of the mean and of the variance
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(sample.mean() - 0.5) < 4 * math.sqrt(variance / count)
    assert abs(sample.var() - variance) < 4 * variance * math.sqrt(2 / count)
    # its density near 0 goes as x^(a - 1) / B(a, a): P(x < e) = e^a / (a B(a, a)) to first order
    edge = 0.01
    expected = edge**alpha / (alpha * math.gamma(alpha) ** 2 / math.gamma(2 * alpha))
    assert abs((sample < edge).mean() / expected - 1) < 0.03 + 4 / math.sqrt(count * expected)


def test_small_alphas_do_not_underflow() -> None:
    sample = beta(0.001, np.random.default_rng(0).uniform(size=(1000, 128)))
    assert np.isfinite(sample).all()
    assert abs((sample > 0.5).mean() - 0.5) < 0.07  # binomial: standard deviation 0.016


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (np.arange(3), {}, "block = 2 does not divide the 3 rows"),
        (np.arange(1, 5), {}, r"block = 2 does not divide the 4 rows of each rank \(from row 1 on\)"),
        (np.arange(4), {"block": 1}, "block = 1"),
        (np.arange(4), {"block": 4, "shift": 4}, "block = 4 with shift = 4"),
        (np.arange(4), {"alpha": 0.0}, r"alpha = 0\.0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(rows: np.ndarray, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_mix(rows, **{"step": 0, "seed": 0, "stream": 0, "alpha": 1.0, **settings})
