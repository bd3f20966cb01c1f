"""Width groups: each file is decoded once in the group, and the slices are those of the whole images, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpl_scale.augment import StrongView
from mpl_scale.config.schema import DataConfig, StrongConfig, WeakConfig
from mpl_scale.data import ImageFiles, ImageFormat, Splits, evaluation_batches, load_images
from mpl_scale.data.decode.quarantine import Quarantine
from mpl_scale.data.slices import Columns, share
from mpl_scale.mesh import Mesh, build_mesh
from mpl_scale.types import Batch
from tests.support.bad_files import SPOIL
from tests.support.batches import splits_of, take, train_loader
from tests.support.image_sets import write_folder
from tests.support.ranks import pool
from tests.support.tiers import crossed, full

STEPS = 4
# image size, columns by width: uneven ones, and a rank with a single column
CUTS = {
    8: {2: [(0, 4), (4, 8)], 4: [(0, 2), (2, 4), (4, 6), (6, 8)]},
    75: {2: [(0, 38), (38, 75)], 4: [(0, 19), (19, 38), (38, 57), (57, 75)]},
    10: {2: [(0, 9), (9, 10)], 4: [(0, 3), (3, 4), (4, 4), (4, 10)]},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = str(tmp_path_factory.mktemp("data") / "digits")
    strong = StrongConfig(cutout=3, ops=["rotate", "equalize", "shear_x", "translate_x"])  # need whole images
    config = DataConfig(root=root, weak=WeakConfig(pad=1, fill=7, flip=True), strong=strong, evaluation_batch=150)
    load_images(config)
    return config


def unsplit(mesh: Mesh) -> Mesh:
    """The mesh of a run of width 1 at the same data index."""
    return dataclasses.replace(mesh, width=1, width_index=0, width_group=None)


@contextlib.contextmanager
def counted_reads() -> Iterator[list[str]]:
    """The files that are read inside, in order."""
    paths: list[str] = []
    read = ImageFiles.read

    def counting(images: ImageFiles, sample: int) -> np.ndarray:
        paths.append(images.name(sample))
        return read(images, sample)

    ImageFiles.read = counting
    try:
        yield paths
    finally:
        ImageFiles.read = read


def train_batches(config: DataConfig, mesh: Mesh, size: int, **changes: Any) -> list[Batch]:
    options: dict[str, Any] = {
        "image_size": size,
        "labelled": 6 * mesh.data,
        "unlabelled": 10 * mesh.data,
        "start_step": 2,
        "strong_view": StrongView(config.strong, seed=0, stream=1),
    }
    return take(train_loader(config, splits_of(config), mesh, **(options | changes)), STEPS)


def compare_training(config: DataConfig, width: int, size: int, changes: dict[str, Any]) -> tuple[int, list[str]]:
    """On a rank: its columns of the whole images equal its slices. Returns its data index and the files it read."""
    mesh = build_mesh(device=torch.device("cpu"), width=width)
    columns = CUTS[size][width]
    start, stop = columns[mesh.width_index]
    with counted_reads() as paths:
        sliced = train_batches(config, mesh, size, columns=columns, **changes)
    for ours, whole in zip(sliced, train_batches(config, unsplit(mesh), size, **changes), strict=True):
        for name in ("labelled", "weak", "strong"):
            expected = getattr(whole, name)[..., start:stop]
            assert torch.equal(getattr(ours, name), expected), name
            assert getattr(ours, name).shape == expected.shape
        for name in ("labels", "labelled_rows", "unlabelled_rows"):
            assert torch.equal(getattr(ours, name), getattr(whole, name)), name
    return mesh.data_index, paths


def files_of(config: DataConfig, place: Mesh, size: int, changes: dict[str, Any]) -> list[str]:
    with counted_reads() as paths:
        train_batches(config, place, size, **changes)
    return paths


@pytest.mark.parametrize(
    ("world", "width", "size"),
    [
        *((2, 2, 8), full(2, 2, 75), full(2, 2, 10)),
        *(full(4, 4, 8), full(4, 4, 75), (4, 4, 10)),
        *(full(4, 2, 8), (4, 2, 75), full(4, 2, 10)),
    ],
)
def test_slices_are_those_of_whole_images(digits: DataConfig, world: int, width: int, size: int) -> None:
    """Of 6 labelled and 10 unlabelled images each is read once in the group; what is read ahead depends on threads."""
    ranks = pool(world).run(compare_training, digits, width, size, {})
    place = build_mesh(device=torch.device("cpu"))
    shares = [
        len(range(16)[share(6, ranks=width, index=index)])
        + len(range(16)[share(10, ranks=width, index=index, extra_last=True)])
        for index in range(width)
    ]
    assert max(shares) - min(shares) <= 1
    for group in range(world // width):
        members = [paths for index, paths in ranks if index == group]
        taken = [paths[: STEPS * own] for paths, own in zip(members, shares, strict=True)]
        alone = dataclasses.replace(place, data=world // width, data_index=group)
        assert sorted(path for paths in taken for path in paths) == sorted(
            files_of(digits, alone, size, {})[: STEPS * 16]
        )


LARGER_THAN_ITS_BATCH = {"labelled": 1, "unlabelled": 2}
WITHOUT_UNLABELLED = {"labelled": 1, "unlabelled": 0}
SINGLE_VIEW: dict[str, Any] = {"strong_view": None}
UNEVEN = {"labelled": 5, "unlabelled": 3}


@crossed(
    "width, changes",
    (2, 4),
    (LARGER_THAN_ITS_BATCH, WITHOUT_UNLABELLED, SINGLE_VIEW, UNEVEN),
    quick=[(2, WITHOUT_UNLABELLED), (2, SINGLE_VIEW), (2, UNEVEN), (4, LARGER_THAN_ITS_BATCH)],
)
def test_groups_larger_than_their_batch_and_single_views(
    digits: DataConfig, width: int, changes: dict[str, Any]
) -> None:
    pool(width).run(compare_training, digits, width, 8, changes)


def compare_evaluation(config: DataConfig, width: int, size: int) -> tuple[int, int]:
    mesh = build_mesh(device=torch.device("cpu"), width=width)
    columns, splits = CUTS[size][width], splits_of(config)
    start, stop = columns[mesh.width_index]
    with counted_reads() as paths:
        images = ImageFormat(image_size=size, columns=columns)
        sliced = list(evaluation_batches(config, splits, images=images, mesh=mesh))
    read = len(paths)
    whole = list(evaluation_batches(config, splits, images=ImageFormat(image_size=size), mesh=unsplit(mesh)))
    for ours, expected in zip(sliced, whole, strict=True):
        assert torch.equal(ours.images, expected.images[..., start:stop])
        assert torch.equal(ours.labels, expected.labels)
        assert torch.equal(ours.valid, expected.valid)
    return read, sum(len(batch.labels) for batch in whole)


@pytest.mark.parametrize(
    ("per_rank", "world", "width", "size"),
    [
        *((150, 2, 2, 8), full(150, 2, 2, 75), full(150, 2, 2, 10)),
        *(full(150, 4, 4, 8), full(150, 4, 4, 75), (150, 4, 4, 10)),
        *(full(150, 4, 2, 8), (150, 4, 2, 75), full(150, 4, 2, 10)),
        *((3, 2, 2, 8), full(3, 4, 4, 8), full(3, 4, 2, 8)),  # many small batches: one size is enough
    ],
)
def test_evaluation_slices(digits: DataConfig, world: int, width: int, size: int, per_rank: int) -> None:
    config = digits.model_copy(update={"evaluation_batch": per_rank})
    ranks = pool(world).run(compare_evaluation, config, width, size)
    assert sum(read for read, _ in ranks) == sum(images for _, images in ranks) / width


def compare_spoilt(config: DataConfig, splits: Splits, spoilt: str) -> tuple[str | None, bool]:
    """On a rank: the reason it found for the spoilt file, and whether it is the rank that read it."""
    mesh = build_mesh(device=torch.device("cpu"), width=2)
    columns = CUTS[8][2]
    start, stop = columns[mesh.width_index]

    def load(place: Mesh, quarantine: Quarantine, columns: Columns | None) -> list[Batch]:
        changes = {"labelled": 2, "unlabelled": 4, "columns": columns, "quarantine": quarantine}
        return take(train_loader(config, splits, place, **changes), 20)

    own = Quarantine(max_fraction=1.0)
    with counted_reads() as paths:
        sliced = load(mesh, own, columns)
    for ours, whole in zip(sliced, load(unsplit(mesh), Quarantine(max_fraction=1.0), None), strict=True):
        for name in ("labelled", "weak", "strong"):
            assert torch.equal(getattr(ours, name), getattr(whole, name)[..., start:stop]), name
        assert torch.equal(ours.labels, whole.labels)
    return next(iter(own.bad.values()), None), spoilt in paths


@pytest.mark.parametrize("kind", SPOIL)
@pytest.mark.parametrize("part", ["labelled", "unlabelled"])
def test_a_bad_file_is_replaced_on_the_whole_group(tmp_path: Path, kind: str, part: str) -> None:
    """Pixels and label of the substitute on every rank, though one of them alone has seen the file."""
    spoil, reason = SPOIL[kind]
    config = DataConfig(
        source="folder",
        root=str(write_folder(tmp_path / "root", images=20)),
        labelled_per_class=2,
        unlabelled_from="rest",
        weak=WeakConfig(pad=1),
    )
    splits = splits_of(config)
    sample = int(getattr(splits, part)[1])  # of the labelled ones: the last of its class
    path = splits.images.name(sample)
    spoil(Path(path))
    results = pool(2).run(compare_spoilt, config, splits, path)
    found = [why for why, read in results if read]
    assert all(why is not None and reason in why for why in found)
    assert [why for why, read in results if not read] == [None] * (2 - len(found))
    if part == "labelled":
        assert splits.images.labels[sample] != splits.images.labels[splits.labelled[2]]


def end_early(config: DataConfig, splits: Splits) -> str:
    """On a rank: the error it ends with."""
    mesh = build_mesh(device=torch.device("cpu"), width=2)
    loader = train_loader(config, splits, mesh, labelled=2, unlabelled=4, columns=CUTS[8][2])
    with pytest.raises(ValueError, match=r"unreadable image.*delete or replace") as caught:
        take(loader, 40)
    return str(caught.value)


def test_too_many_bad_files_end_the_whole_group(tmp_path: Path) -> None:
    """One rank finds them; nobody is left waiting for it."""
    config = DataConfig(source="folder", root=str(write_folder(tmp_path / "root", images=40)))
    splits = splits_of(config)
    for sample in splits.unlabelled[::2]:
        Path(splits.images.name(sample)).unlink()
    messages = pool(2).run(end_early, config, splits)
    assert all("cannot be read: No such file or directory" in message for message in messages)


def test_columns_must_cut_the_image(digits: DataConfig) -> None:
    mesh = dataclasses.replace(build_mesh(device=torch.device("cpu")), width=2)
    for columns in ([(0, 8)], [(0, 4), (5, 8)], [(0, 4), (4, 9)], [(0, 9), (9, 8)]):
        with pytest.raises(ValueError, match="do not cut 8 columns over 2 ranks"):
            train_batches(digits, mesh, 8, columns=columns)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 16])
def test_shares_cover_all_rows_and_differ_by_at_most_one(ranks: int) -> None:
    for labelled, unlabelled in itertools.product(range(35), repeat=2):
        first = [share(labelled, ranks=ranks, index=index) for index in range(ranks)]
        last = [share(unlabelled, ranks=ranks, index=index, extra_last=True) for index in range(ranks)]
        sums = [0] * ranks
        for count, parts in ((labelled, first), (unlabelled, last)):
            assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
            sums = [total + part.stop - part.start for total, part in zip(sums, parts, strict=True)]
        assert max(sums) - min(sums) <= 1
