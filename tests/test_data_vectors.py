"""Two moons through the trainer: the same global batches however they are divided, and what vectors have not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.in_memory import Batches, PointViews, Samples
from mpl_scale.config import RunConfig, check, load_config
from mpl_scale.config.schema import DataConfig
from mpl_scale.data import ImageFormat, Quarantine, evaluation_batches, load_images, make_splits
from mpl_scale.data.resident_parts import ResidentParts
from mpl_scale.data.vectors import Jitter, VectorSet, resident_vectors
from mpl_scale.mesh import build_mesh
from mpl_scale.trainer.data_source import DataSource
from mpl_scale.trainer.phases import plan_phases
from mpl_scale.trainer.preflight import check_models, check_names, load_splits
from mpl_scale.trainer.prepare import Options, train
from mpl_scale.types import Batch
from tests.support.batches import data_rank, joined, splits_of, train_loader
from tests.support.configs import DIGITS

MOONS = DIGITS.parent / "two_moons.json"
CPU = torch.device("cpu")
JITTER = 0.1


def moons(*overrides: str) -> RunConfig:
    return load_config(MOONS, overrides=overrides)


def batches(*, ranks: int, start: int, steps: int, labelled: int = 8, unlabelled: int = 24) -> list[Batch]:
    """Global batches, put together from those of all data ranks."""
    data = moons(f"mpl_scale.data.jitter={JITTER}").mpl.data
    splits = splits_of(data)
    changes = {
        "image_size": 1,
        "strong_view": Jitter(seed=0, stream=1, deviation=JITTER),
        "resident": resident_vectors(splits.images, CPU),
        "labelled": labelled,
        "unlabelled": unlabelled,
        "start_step": start,
    }
    own = [train_loader(data, splits, data_rank(ranks, rank), **changes) for rank in range(ranks)]
    return [Batch(**joined([next(loader) for loader in own])) for _ in range(steps)]


def test_the_points_and_their_split() -> None:
    images = load_images(moons().mpl.data)
    splits = make_splits(images, config=moons().mpl.data, seed=0)
    assert isinstance(images, VectorSet)
    assert images.inputs.shape == (2000, 2)
    assert np.bincount(images.labels[splits.labelled]).tolist() == [3, 3]
    assert splits.test.tolist() == splits.unlabelled.tolist() == list(range(2000))
    other = make_splits(images, config=moons().mpl.data, seed=1)
    assert other.labelled.tolist() != splits.labelled.tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_global_batches_do_not_depend_on_ranks_nor_on_the_start(ranks: int) -> None:
    whole = batches(ranks=1, start=0, steps=6)
    for expected, found in zip(whole[2:], batches(ranks=ranks, start=2, steps=4), strict=True):
        for name, value in expected.tensors().items():
            assert torch.equal(found.tensors()[name], value), name
    assert not torch.equal(whole[0].weak, whole[1].weak)


def test_the_strong_view_is_noise_of_the_given_deviation() -> None:
    added = torch.cat([batch.strong - batch.weak for batch in batches(ranks=1, start=0, steps=100)])
    assert added.numel() == 4800
    # standard errors: 0.1 / sqrt(4800) of the mean, 0.1 / sqrt(9600) of the deviation; five of each
    assert abs(added.mean().item()) < 5 * JITTER / 4800**0.5
    assert abs(added.std().item() - JITTER) < 5 * JITTER / 9600**0.5


def test_a_step_sees_what_runs_in_memory_see() -> None:
    """benchmarks/in_memory.py, whose figures are in docs/experiments.md."""

    class Views(PointViews):
        jitter = JITTER

    run = moons(f"mpl_scale.data.jitter={JITTER}")
    phase = plan_phases(run.mpl, check(run, world=1, cuda=False), max_steps=None)[0]
    splits = load_splits(run)
    images, labels = splits.images, torch.from_numpy(splits.images.labels)
    assert isinstance(images, VectorSet)
    samples = Samples(images.inputs, labels, labels, splits.labelled, splits.unlabelled, splits.test)
    in_memory = Batches(samples, Views(samples, run.mpl, stream=phase.index), phase, seed=run.mpl.seed)
    mesh, config = build_mesh(device=CPU), run.mpl
    parts = ResidentParts(config.data, splits, image_size=config.model.image_size, device=CPU, quarantine=Quarantine())
    loader = DataSource(config, splits, mesh, parts).batches(phase, start_step=0)
    for step in range(3):
        expected, found = in_memory(step).tensors(), next(loader).tensors()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_every_point_is_evaluated_once() -> None:
    data = moons().mpl.data
    splits = make_splits(load_images(data), config=data, seed=0)
    found = []
    for rank in range(3):
        mesh = replace(build_mesh(device=CPU), data=3, data_index=rank, world=3)
        for images, labels, valid in evaluation_batches(data, splits, images=ImageFormat(image_size=1), mesh=mesh):
            found.append(torch.cat([images, labels[:, None]], 1)[valid])
    rows = torch.cat(found)
    assert isinstance(splits.images, VectorSet)
    expected = torch.cat([splits.images.inputs, torch.from_numpy(splits.images.labels)[:, None]], 1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_supervised_learning_of_all_labels_learns_the_moons(tmp_path: Path) -> None:
    settings = {
        "mpl_scale.method.name": "supervised",
        "mpl_scale.data.labelled_per_class": 1000,
        "train_batch_size": 100,
        "mpl_scale.phases.train.steps": 600,
        **{f"mpl_scale.model.{name}.init_range": 1.0 for name in ("teacher", "student")},
        **{f"mpl_scale.optim.{name}.lr": 0.5 for name in ("teacher", "student")},
        **{f"mpl_scale.optim.{name}.momentum": 0.9 for name in ("teacher", "student")},
    }
    summary = train(moons(*(f"{key}={value}" for key, value in settings.items())), Options(tmp_path))
    assert summary["results"]["student"]["top1"] > 95  # a line through the plane gets 88


def prepare(run: RunConfig) -> None:
    """What a run does first."""
    check_names(run)
    load_splits(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "somewhere"}, r"data.root = 'somewhere', but source 'two_moons' reads no files; remove root"),
        (
            {"index": "an.index"},
            r"data.index = 'an.index' is for sources that are indexed, and source two_moons is not",
        ),
        ({"unlabelled_index": "x"}, r"data.unlabelled_index = 'x' is for images"),
        ({"distributions": "x.npy"}, r"data.distributions = 'x.npy' is for images"),
        ({"split": "test_files"}, r"split = 'test_files' needs a source with a test part of its own"),
        ({"labelled_per_class": 1001}, r"labelled_per_class = 1001, but class '0' has 1000"),
    ],
    ids=str,
)
def test_what_vectors_have_not_is_named(changes: dict[str, Any], message: str) -> None:
    run = moons(*(f"mpl_scale.data.{name}={value}" for name, value in changes.items()))
    with pytest.raises(ValueError, match=message):
        prepare(run)


def test_a_network_of_images_cannot_see_vectors_nor_the_other_way_round() -> None:
    with pytest.raises(ValueError, match=r"student.name = digits_cnn cannot take vectors of 2 numbers: "):
        check_models(moons("mpl_scale.model.student.name=digits_cnn", "mpl_scale.model.student.init=default"))
    with pytest.raises(ValueError, match=r"two_moons_mlp cannot take images of mpl_scale.model.image_size = 8"):
        check_models(load_config(DIGITS, overrides=["mpl_scale.model.teacher.name=two_moons_mlp"]))
    with pytest.raises(ValueError, match=r"source = 'two_moons' has vectors, and this needs images"):
        load_images(DataConfig(source="two_moons")).read(0)
