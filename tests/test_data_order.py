"""Sample order, splits and the plan of a step are pure functions of the seed and the step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpl_scale.config.schema import DataConfig, WeakConfig
from mpl_scale.data import make_splits
from mpl_scale.data.decode.views import Placement, View, weak_view
from mpl_scale.data.samples.order import shuffled
from mpl_scale.data.samples.plan import Draws, SamplePlan
from mpl_scale.data.samples.streams import Purpose, stream_of
from tests.support.image_sets import image_set


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 2000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2**40))
def test_shuffled_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_shuffled_reaches_beyond_32_bits() -> None:
    size = 10**12
    index = np.arange(size - 1000, size)
    order = shuffled(index, size=size, seed=0, epoch=0)
    assert len(np.unique(order)) == 1000
    assert order.min() >= 0
    assert 2**32 < order.max() < size


@pytest.mark.parametrize("changed", ["seed", "epoch", "stream"])
def test_each_seed_epoch_and_stream_has_its_own_order(changed: str) -> None:
    keys = {"seed": 1, "epoch": 1, "stream": 1}
    index = np.arange(1000)
    first, second = (shuffled(index, size=1000, **keys), shuffled(index, size=1000, **{**keys, changed: 2}))
    assert (first == second).sum() < 10  # independent permutations share one place on average


@pytest.mark.parametrize("size", [5, 40])
def test_every_sample_comes_at_every_place_equally_often(size: int) -> None:
    epochs = np.repeat(np.arange(200 * size), size)
    index = np.tile(np.arange(size), 200 * size)
    order = shuffled(index, size=size, seed=0, epoch=epochs)
    counts = np.bincount(index * size + order, minlength=size * size)  # 200 expected in each of size^2 cells
    # Summed permutation matrices: the covariance of the cells is size / (size - 1) times that of a contingency table.
    chi_square = ((counts - 200) ** 2 / 200).sum() * (size - 1) / size
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # mean + 4 standard deviations of chi-square


def test_index_outside_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match="size = 5"):
        shuffled(np.array([5]), size=5, seed=0, epoch=0)


def view(pad: int = 2) -> View:
    return weak_view(WeakConfig(pad=pad, flip=True), 8)


def placed(draws: Draws, pad: int = 2) -> Placement:
    return view(pad).place(draws.uniform, np.full((len(draws.ids), 2), 8))


def plan(
    rows: np.ndarray, batch: int = 32, *, seed: int = 0, pad: int = 2, ids: np.ndarray | None = None
) -> SamplePlan:
    return SamplePlan(
        np.arange(1000, 1050) if ids is None else ids,
        batch=batch,
        rows=rows,
        columns=view(pad).columns,
        seed=seed,
        order_stream=stream_of(Purpose.LABELLED_ORDER),
        view_stream=stream_of(Purpose.LABELLED_VIEW),
    )


def test_every_epoch_holds_every_sample_once() -> None:
    steps = [plan(np.arange(32)).draw(step) for step in range(25)]  # 800 = 16 epochs of 50
    ids = np.concatenate([draws.ids for draws in steps]).reshape(16, 50)
    epochs = np.concatenate([draws.epochs for draws in steps]).reshape(16, 50)
    assert np.array_equal(np.sort(ids), np.tile(np.arange(1000, 1050), (16, 1)))
    assert np.array_equal(epochs, np.tile(np.arange(16)[:, None], 50))


def test_a_step_does_not_depend_on_rows_history_or_chunks() -> None:
    steps = (0, 127, 128, 129, 5, 10**9)  # around the boundary between planned chunks, backwards, far away
    whole, part = plan(np.arange(32)), plan(np.arange(8, 16))
    for step in steps:
        expected, planned = plan(np.arange(32)).draw(step), whole.draw(step)
        piece = part.draw(step)
        for field in ("ids", "epochs", "uniform"):
            assert np.array_equal(getattr(expected, field), getattr(planned, field))
            assert np.array_equal(getattr(expected, field)[8:16], getattr(piece, field))


def test_windows_and_flips_are_uniform() -> None:
    drawn = placed(plan(np.arange(5000), 5000, ids=np.arange(5000)).draw(0))
    for axis in range(2):
        counts = np.bincount(drawn["windows"][:, axis] + 2, minlength=5)  # offsets -2 to 2
        assert len(counts) == 5
        assert np.abs(counts - 1000).max() < 114  # binomial(5000, 1/5): four standard deviations
    assert abs(drawn["flips"].sum() - 2500) < 142  # binomial(5000, 1/2): four standard deviations
    assert abs(np.corrcoef(drawn["windows"].T)[0, 1]) < 4 / np.sqrt(5000)
    still = placed(plan(np.arange(32), pad=0).draw(0), pad=0)
    assert not still["windows"].any()


@pytest.mark.parametrize("unlabelled_from", ["training", "rest", "labelled"])
def test_splits(unlabelled_from: str) -> None:
    images = image_set([30, 60, 90])
    config = DataConfig(test_fraction=1 / 3, labelled_per_class=5, unlabelled_from=unlabelled_from)
    splits = make_splits(images, config=config, seed=0)
    assert np.bincount(images.labels[splits.test]).tolist() == [10, 20, 30]
    assert np.bincount(images.labels[splits.labelled]).tolist() == [5, 5, 5]
    training = np.setdiff1d(np.arange(180), splits.test)
    expected = {"training": training, "rest": np.setdiff1d(training, splits.labelled), "labelled": splits.labelled}
    assert np.array_equal(splits.unlabelled, expected[unlabelled_from])
    assert np.isin(splits.labelled, training).all()


def test_splits_depend_on_the_split_seed_alone() -> None:
    images = image_set([30, 60, 90])
    own = [make_splits(images, config=DataConfig(split_seed=7), seed=seed) for seed in (0, 1)]
    assert np.array_equal(own[0].test, own[1].test)
    assert np.array_equal(own[0].labelled, own[1].labelled)
    runs = [make_splits(images, config=DataConfig(), seed=seed) for seed in (0, 1)]
    assert not np.array_equal(runs[0].test, runs[1].test)
    assert not np.array_equal(runs[0].labelled, runs[1].labelled)


def test_a_class_with_too_few_images_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"labelled_per_class = 5, but class 'class1' has 6 training images, .* holds out 2 of them"
    ):
        make_splits(image_set([30, 6]), config=DataConfig(labelled_per_class=5), seed=0)
