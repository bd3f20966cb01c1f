"""The strong view of an image depends on its pixels, id, epoch and the seed: on nothing else."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpl_scale.augment import OPS, Given, Operation, StrongView
from mpl_scale.augment.cutout import cutout
from mpl_scale.config.schema import StrongConfig

IDS = np.arange(100, 164, dtype=np.int64)
EPOCHS = np.arange(64, dtype=np.int64) // 40
CANDIDATES = np.arange(1000, 1500, dtype=np.int64)


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


@pytest.mark.parametrize("settings", [{"op_set": "imagenet", "cutout": 30}, {"preset": "released_code"}], ids=str)
def test_large_images_on_a_cpu_have_the_view_of_a_gpu(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, in numpy and Pillow: as all in a batch, in torch."""
    config = StrongConfig(**settings, num_ops=3)
    view = StrongView(config, seed=3, stream=1, candidates=CANDIDATES)
    images, partners = noise(size=112), noise(size=112).roll(1, 0)
    result = view(images.to(memory_format=torch.channels_last), IDS, EPOCHS, partners)
    monkeypatch.setattr("mpl_scale.augment.large.SMALLEST", 1 << 60)
    assert torch.equal(view(images, IDS, EPOCHS, partners), result)


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
        def apply(images: torch.Tensor, strength: np.ndarray, given: Given) -> torch.Tensor:
            drawn[name] += len(images)
            assert len(strength) == len(images)
            assert np.abs(strength).max() <= 0.9  # magnitude 9 of 10
            return images

        return Operation(name, apply)

    monkeypatch.setattr("mpl_scale.augment.registry.OPS", {name: counting(name) for name in drawn})
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
    assert torch.equal(view(images, IDS, EPOCHS), OPS["solarize"](images, np.full(64, 128.0), Given()))


def test_cutout_fills_a_clipped_square() -> None:
    images = torch.full((3, 3, 10, 10), 9, dtype=torch.uint8)
    centres = np.array([[0.55, 0.55], [0.01, 0.01], [0.99, 0.55]])  # pixels (5, 5), (0, 0) and (9, 5)
    result = cutout(images, np.full(3, 4), centres=centres, fill=1)
    expected = images.clone()
    expected[0, :, 3:7, 3:7] = 1
    expected[1, :, 0:2, 0:2] = 1
    expected[2, :, 7:10, 3:7] = 1
    assert torch.equal(result, expected)


def test_stream_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="stream = 16777216"):
        StrongView(StrongConfig(), seed=0, stream=1 << 24)


# What every draw of the strong view gave before Sample Pairing, probability ranges and the second crop were added.
DIGESTS = {
    "default": ({"cutout": 4}, "e5b02b2f91a579b1"),
    "fixed": (
        {"num_ops": 3, "probability": 0.7, "random_magnitude": False, "magnitude": 10.0, "fill": 128},
        "4877c69a45465401",
    ),
    "few": ({"ops": ["rotate", "equalize", "sharpness"], "cutout": 7, "fill": 9}, "6cafbcdb66f0b4ae"),
}


@pytest.mark.parametrize("name", DIGESTS)
def test_old_configs_still_give_the_same_pixels(name: str) -> None:
    """Published figures rest on them: a new draw takes new columns of Philox numbers."""
    settings, expected = DIGESTS[name]
    result = StrongView(StrongConfig(**settings), seed=3, stream=1)(noise(size=24), IDS, EPOCHS)
    assert hashlib.sha256(result.numpy().tobytes()).hexdigest()[:16] == expected


def paired(view: StrongView, ids: np.ndarray, epochs: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """The strong views with every partner's pixels a function of its id."""
    named = view.partners(ids, epochs)
    pixels = torch.from_numpy((named[:, None, None, None] % 251 * np.ones((1, 3, 12, 12))).astype(np.uint8))
    return view(images, ids, epochs, pixels)


def test_partners_are_uniform_over_the_candidates_and_asked_for_only_where_needed() -> None:
    view = StrongView(StrongConfig(op_set="imagenet", num_ops=1), seed=0, stream=0, candidates=CANDIDATES)
    ids, epochs = np.arange(60_000), np.zeros(60_000, np.int64)
    named = view.partners(ids, epochs)
    asked = named >= 0
    assert abs(asked.sum() - 4000) < 250  # binomial(60000, 1/15): standard deviation 61; four deviations
    counts = np.bincount(named[asked] - 1000, minlength=500)
    # 500 cells of 8 on average: chi-squared with 499 degrees of freedom, mean 499 and deviation 31.6; four deviations
    assert abs(((counts - counts.mean()) ** 2).sum() / counts.mean() - 499) < 127
    assert (view.partners(ids, epochs + 1)[asked] != named[asked]).mean() > 0.9


def test_sample_pairing_does_not_depend_on_how_the_batch_is_divided() -> None:
    view = StrongView(StrongConfig(op_set="cifar10"), seed=3, stream=1, candidates=CANDIDATES)
    images = noise()
    whole = paired(view, IDS, EPOCHS, images)
    parts = [paired(view, IDS[p], EPOCHS[p], images[p]) for p in (slice(0, 5), slice(5, 6), slice(6, 64))]
    assert torch.equal(whole, torch.cat(parts))


def test_sample_pairing_mixes_in_the_partner_and_only_where_it_was_named() -> None:
    config = StrongConfig(ops=["sample_pairing", "invert"], num_ops=1, random_magnitude=False, magnitude=10.0)
    view = StrongView(config, seed=3, stream=1, candidates=CANDIDATES)
    images, named = noise(), view.partners(IDS, EPOCHS)
    partners = torch.zeros_like(images)
    partners[torch.from_numpy(named < 0)] = 255  # not to be read
    result = view(images, IDS, EPOCHS, partners)
    asked = torch.from_numpy(named >= 0)
    assert 10 < asked.sum() < 54  # binomial(64, 1/2): standard deviation 4
    assert torch.equal(result[~asked], 255 - images[~asked])
    # 0.4 of black; the weight is a multiple of 1/4096, so a level may be one lower than 0.6 x
    assert (result[asked] - 0.6 * images[asked]).abs().max() <= 1


def test_missing_partners_are_refused() -> None:
    view = StrongView(StrongConfig(op_set="cifar10"), seed=3, stream=1, candidates=CANDIDATES)
    with pytest.raises(ValueError, match="sample_pairing: give the partners' images"):
        view(noise(), IDS, EPOCHS)
    with pytest.raises(ValueError, match='set op_set to "no_pairing"'):
        StrongView(StrongConfig(op_set="cifar10"), seed=3, stream=1).partners(IDS, EPOCHS)
    assert (StrongView(StrongConfig(), seed=3, stream=1).partners(IDS, EPOCHS) == -1).all()


def test_one_probability_per_image_lies_in_its_range() -> None:
    """With p ~ U(0.2, 0.8) an image keeps both of its two operations away with E[(1 - p)^2] = 0.28, not 0.25."""
    config = StrongConfig(ops=["invert"], num_ops=2, probability_range=(0.2, 0.8))
    count = 20_000
    result = StrongView(config, seed=0, stream=0)(
        torch.zeros(count, 3, 1, 1, dtype=torch.uint8), np.arange(count), np.zeros(count, np.int64)
    )
    # applied once with E[2 p (1 - p)] = 0.44: standard deviation 0.0035; four deviations
    assert abs((result[:, 0, 0, 0] == 255).double().mean() - 0.44) < 0.014


def test_the_released_codes_view_ends_with_a_second_crop_and_flip() -> None:
    ramp = (torch.arange(20, dtype=torch.uint8) * 10 + 5)[:, None] + torch.arange(20, dtype=torch.uint8)
    images = ramp.expand(200, 3, 20, 20)
    config = StrongConfig(num_ops=0, crop_pad=4, flip=True, fill=128)
    view = StrongView(config, seed=0, stream=0)
    result = view(images, np.arange(200), np.zeros(200, np.int64))
    padded = F.pad(images[:1].int(), (4, 4, 4, 4), value=128)[0, 0]
    windows = {(y, x): padded[y : y + 20, x : x + 20] for y in range(9) for x in range(9)}
    found = set()
    for image in result[:, 0].int():
        hits = [
            (*at, flipped)
            for at, window in windows.items()
            for flipped in (False, True)
            if torch.equal(image, window.flip(1) if flipped else window)
        ]
        assert len(hits) == 1
        found.add(hits[0])
    assert len(found) > 100  # of 162, in 200 draws: 115 are expected


def test_released_code_preset_sets_what_is_not_given() -> None:
    config = StrongConfig(preset="released_code", magnitude=5.0)
    assert (config.op_set, config.magnitude, config.cutout, config.fill) == ("released_code", 5.0, 16, 128)
    assert config.probability_range == (0.2, 0.8)
    assert StrongConfig.model_validate(config.model_dump()) == config, "a written configuration loads as itself"
    assert StrongConfig.model_validate_json(config.model_dump_json()) == config
    assert StrongConfig(preset="paper").op_set == "cifar10"
    assert StrongConfig(preset="paper", ops=["invert"]).op_set is None
    view = StrongView(config, seed=0, stream=0)
    assert view(noise(size=32), IDS, EPOCHS).shape == (64, 3, 32, 32)


def test_two_lists_or_an_upside_down_range_are_refused() -> None:
    with pytest.raises(ValueError, match="both say what to draw from"):
        StrongConfig(ops=["invert"], op_set="svhn")
    with pytest.raises(ValueError, match=r"probability_range = \[0\.8, 0\.2\] is upside down"):
        StrongConfig(probability_range=(0.8, 0.2))
