"""The strong view of an image depends on its pixels, id, epoch and the seed: on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpl_scale.augment import OPS, Operation, StrongView
from mpl_scale.augment.strong import cutout
from mpl_scale.config.schema import StrongConfig

IDS = np.arange(100, 164, dtype=np.int64)
EPOCHS = np.arange(64, dtype=np.int64) // 40


def noise(count: int = 64, size: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize("random_magnitude", [True, False])
def test_does_not_depend_on_how_the_batch_is_divided(random_magnitude: bool) -> None:
    view = StrongView(StrongConfig(cutout=4, random_magnitude=random_magnitude, probability=0.8), seed=3, stream=1)
    images = noise()
    whole = view(images, IDS, EPOCHS)
    parts = [view(images[part], IDS[part], EPOCHS[part]) for part in (slice(0, 32), slice(32, 33), slice(33, 64))]
    assert torch.equal(whole, torch.cat(parts))
    order = np.random.default_rng(1).permutation(64)
    assert torch.equal(whole[order], view(images[order], IDS[order], EPOCHS[order]))


@pytest.mark.parametrize("change", ["seed", "stream", "epoch", "ids"])
def test_depends_on_every_key(change: str) -> None:
    config, images = StrongConfig(), noise()
    before = StrongView(config, seed=3, stream=1)(images, IDS, EPOCHS)
    after = StrongView(config, seed=3 + (change == "seed"), stream=1 + (change == "stream"))(
        images, IDS + (change == "ids"), EPOCHS + (change == "epoch")
    )
    unchanged = (before == after).flatten(1).all(1).float().mean()
    assert unchanged < 0.2  # two independent pairs of 14 operations rarely agree: at most 1 image of 64 here


def test_operations_are_drawn_uniformly_and_applied_with_the_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = dict.fromkeys(("invert", "solarize", "posterize", "color"), 0)

    def counting(name: str) -> Operation:
        def operation(images: torch.Tensor, strength: np.ndarray, *, fill: int) -> torch.Tensor:
            drawn[name] += len(images)
            assert len(strength) == len(images)
            assert np.abs(strength).max() <= 0.9  # magnitude 9 of 10
            return images

        return operation

    for name in drawn:
        monkeypatch.setitem(OPS, name, counting(name))
    view = StrongView(StrongConfig(ops=list(drawn), num_ops=1, probability=0.5), seed=0, stream=0)
    count = 8000
    view(noise(1, 4).expand(count, -1, -1, -1), np.arange(count), np.zeros(count, np.int64))
    # binomial(8000, 1/8): mean 1000, standard deviation 30; four deviations
    assert all(abs(times - 1000) < 120 for times in drawn.values()), drawn


def test_nothing_to_do_returns_the_weak_view() -> None:
    images = noise()
    for config in (StrongConfig(num_ops=0), StrongConfig(probability=0.0)):
        assert torch.equal(StrongView(config, seed=0, stream=0)(images, IDS, EPOCHS), images)


def test_full_magnitude_is_the_operation_itself() -> None:
    images = noise()
    view = StrongView(StrongConfig(ops=["solarize"], num_ops=1, random_magnitude=False, magnitude=5), seed=0, stream=0)
    assert torch.equal(view(images, IDS, EPOCHS), OPS["solarize"](images, np.full(64, 0.5), fill=0))


def test_cutout_fills_a_clipped_square() -> None:
    images = torch.full((3, 3, 10, 10), 9, dtype=torch.uint8)
    centres = np.array([[0.55, 0.55], [0.01, 0.01], [0.99, 0.55]])  # pixels (5, 5), (0, 0) and (9, 5)
    result = cutout(images, centres, side=4, fill=1)
    expected = images.clone()
    expected[0, :, 3:7, 3:7] = 1
    expected[1, :, 0:2, 0:2] = 1
    expected[2, :, 7:10, 3:7] = 1
    assert torch.equal(result, expected)


def test_stream_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="stream = 16777216"):
        StrongView(StrongConfig(), seed=0, stream=1 << 24)
