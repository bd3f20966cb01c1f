"""Batches: the right pixels, the same global batch on any layout of ranks and after any restart."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from mpl_scale.augment import StrongView
from mpl_scale.config.schema import DataConfig, StrongConfig, WeakConfig
from mpl_scale.data import ImageFormat, Splits, evaluation_batches, load_images
from mpl_scale.mesh import Mesh
from mpl_scale.philox import uniform_numpy
from mpl_scale.types import Batch
from tests.support.batches import data_rank as mesh
from tests.support.batches import joined, normalised, splits_of, take, train_loader
from tests.support.image_sets import write_folder
from tests.support.photographs import encoded, photograph
from tests.support.tiers import full

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Written once for the module."""
    root = str(tmp_path_factory.mktemp("data") / "digits")
    config = DataConfig(root=root, weak=WeakConfig(pad=1, fill=7, flip=True), strong=StrongConfig(cutout=3))
    load_images(config)
    return config


def batches(config: DataConfig, place: Mesh, *, steps: int, start: int = 0, **changes: object) -> list[Batch]:
    strong = StrongView(config.strong, seed=0, stream=1)
    options = {"labelled": 8, "unlabelled": 16, "strong_view": strong, "start_step": start} | changes
    return [normalised(batch) for batch in take(train_loader(config, splits_of(config), place, **options), steps)]


@pytest.mark.parametrize("data", [2, 4])
def test_global_batches_do_not_depend_on_the_data_ranks(digits: DataConfig, data: int) -> None:
    single = batches(digits, mesh(), steps=6)
    ranks = [batches(digits, mesh(data, index), steps=6) for index in range(data)]
    for step in range(6):
        expected, actual = joined([single[step]]), joined([rank[step] for rank in ranks])
        for name, value in expected.items():
            assert torch.equal(value, actual[name]), (step, name)
        assert expected["labelled_rows"].tolist() == list(range(8))
        assert expected["unlabelled_rows"].tolist() == list(range(16))
    assert not torch.equal(single[0].weak, single[1].weak)


class Photographs:
    """60 photographs of many sizes, some turned by EXIF, in memory."""

    labels = np.arange(60) % 3
    sizes = np.zeros((60, 2), np.int32)
    classes = ("china", "flower", "hopper")
    refused = np.zeros(0, np.int64)

    def __init__(self) -> None:
        turned = Image.Exif()
        turned[0x0112] = 6
        self.files = [
            encoded(
                photograph(index, 60 + 3 * index, 200 - 2 * index),
                "JPEG",
                quality=60 + index % 30,
                exif=turned.tobytes() if index % 5 == 0 else b"",
            )
            for index in range(60)
        ]

    def __len__(self) -> int:
        return 60

    def read(self, sample: int) -> np.ndarray:
        return np.frombuffer(self.files[sample], np.uint8)

    def name(self, sample: int) -> str:
        return f"photograph {sample}"


@pytest.fixture(scope="module")
def photographs() -> Splits:
    ids = np.arange(60)
    return Splits(images=Photographs(), test=ids[48:], labelled=ids[:12], unlabelled=ids[:48])


class Pairing:
    """A strong view that averages about half of the images with another one, and remembers what it was given."""

    def __init__(self, candidates: np.ndarray) -> None:
        self.candidates = candidates
        self.given: list[tuple[np.ndarray, np.ndarray, torch.Tensor]] = []

    def partners(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        numbers = uniform_numpy(seed=5, stream=6, epoch=epochs, ids=ids, columns=2)
        drawn = self.candidates[(numbers[:, 0] * len(self.candidates)).astype(int)]
        return np.where(numbers[:, 1] < 0.5, drawn, -1)

    def __call__(
        self, images: torch.Tensor, ids: np.ndarray, epochs: np.ndarray, partners: torch.Tensor | None = None
    ) -> torch.Tensor:
        needed = self.partners(ids, epochs)
        rows = np.flatnonzero(needed >= 0)
        mixed = images.clone()
        if len(rows):
            self.given += zip(needed[rows], epochs[rows], partners[rows], strict=True)
            mixed[rows] = ((images[rows].int() + partners[rows]) // 2).byte()
        return mixed


VIEWS = {
    "shift_crop": WeakConfig(pad=3, flip=True),
    "random_resized_crop": WeakConfig(kind="random_resized_crop", flip=True, interpolation="bicubic"),
}


@pytest.mark.parametrize(("kind", "pairing"), [full("shift_crop", False), ("random_resized_crop", True)])
def test_20_global_batches_on_1_2_and_4_ranks_and_resumed_elsewhere(
    photographs: Splits, kind: str, pairing: bool
) -> None:
    """Partners that the strong view mixes in included: drawn by id, seen as their own row of that epoch would be."""
    config = DataConfig(weak=VIEWS[kind], strong=StrongConfig(cutout=5))

    def taken(place: Mesh, steps: int, start: int = 0) -> list[Batch]:
        strong = Pairing(photographs.unlabelled) if pairing else StrongView(config.strong, seed=0, stream=1)
        loader = train_loader(config, photographs, place, image_size=24, start_step=start, strong_view=strong)
        return take(loader, steps)

    single = taken(mesh(), 20)
    for data, start in ((2, 0), (4, 0), (2, 13)):
        ranks = [taken(mesh(data, index), 20 - start, start) for index in range(data)]
        for step, parts in enumerate(zip(*ranks, strict=True), start=start):
            expected, actual = joined([single[step]]), joined(list(parts))
            for name, value in expected.items():
                assert torch.equal(value, actual[name]), (data, step, name)


@pytest.mark.parametrize("size", [24, 112])
def test_sample_pairing_gives_the_same_strong_views_on_1_2_and_4_ranks(photographs: Splits, size: int) -> None:
    """Table 5's list for ImageNet; images of 112 pixels are large ones, which a CPU augments one at a time."""
    config = DataConfig(weak=VIEWS["random_resized_crop"], strong=StrongConfig(op_set="imagenet"))

    view = StrongView(config.strong, seed=0, stream=1, candidates=photographs.unlabelled)
    assert (view.partners(photographs.unlabelled, np.zeros(48, np.int64)) >= 0).sum() >= 2

    def taken(place: Mesh) -> list[Batch]:
        changes = {"image_size": size, "unlabelled": 16, "strong_view": view}
        return take(train_loader(config, photographs, place, **changes), 3)

    single = taken(mesh())
    for data in (2, 4):
        ranks = [taken(mesh(data, index)) for index in range(data)]
        for step, parts in enumerate(zip(*ranks, strict=True)):
            assert torch.equal(single[step].strong, joined(list(parts))["strong"]), (data, step)
    assert not torch.equal(single[0].strong, single[0].weak)


def test_partners_are_seen_as_their_own_rows_would_be(photographs: Splits) -> None:
    config = DataConfig(weak=VIEWS["random_resized_crop"], **PLAIN)
    strong = Pairing(photographs.unlabelled)
    changes = {"image_size": 24, "labelled": 1, "unlabelled": 48, "strong_view": strong}
    loader = train_loader(config, photographs, mesh(), **changes)
    views = {}  # by id and epoch: a step is an epoch here
    for epoch, batch in enumerate(take(loader, 3)):
        ids = loader._unlabelled.draw(epoch).ids
        views |= {(int(sample), epoch): view for sample, view in zip(ids, batch.weak, strict=True)}
    assert len(views) == 3 * 48
    assert len(strong.given) > 40
    for partner, epoch, pixels in strong.given:
        assert torch.equal(views[int(partner), int(epoch)], pixels)


def test_channels_last_changes_the_layout_alone(photographs: Splits) -> None:
    config = DataConfig(weak=VIEWS["random_resized_crop"], strong=StrongConfig(cutout=5))
    changes = {"image_size": 24, "strong_view": StrongView(config.strong, seed=0, stream=1)}
    loaders = [train_loader(config, photographs, mesh(), channels_last=last, **changes) for last in (False, True)]
    found = [[normalised(batch) for batch in take(loader, 3)] for loader in loaders]
    for planes, last in zip(*found, strict=True):
        for name in ("labelled", "weak", "strong"):
            assert torch.equal(getattr(planes, name), getattr(last, name))
            assert getattr(planes, name).is_contiguous()
            assert getattr(last, name).is_contiguous(memory_format=torch.channels_last)


def test_a_run_started_at_step_3_continues_bit_for_bit(digits: DataConfig) -> None:
    whole, rest = batches(digits, mesh(), steps=6), batches(digits, mesh(), steps=3, start=3)
    for expected, actual in zip(whole[3:], rest, strict=True):
        for name, value in joined([expected]).items():
            assert torch.equal(value, joined([actual])[name]), name


def test_ranks_of_a_width_group_get_the_same_rows(digits: DataConfig) -> None:
    first = mesh(2, 1, width=2)
    second = dataclasses.replace(first, rank=first.rank + 1, width_index=1)
    for one, other in zip(batches(digits, first, steps=2), batches(digits, second, steps=2), strict=True):
        assert one.labelled_rows.tolist() == [4, 5, 6, 7]
        assert torch.equal(one.strong, other.strong)


def test_batches_say_which_unlabelled_images_they_have(digits: DataConfig) -> None:
    """Their places in the list, over two epochs: by the pixels; on two ranks of width groups, and from step 2 on."""
    config = digits.model_copy(update={"weak": WeakConfig(pad=0, flip=False)})
    splits = dataclasses.replace(splits_of(config), unlabelled=splits_of(config).unlabelled[::40])
    count = len(splits.unlabelled)
    pixels = [np.array(Image.open(splits.images.paths[sample]).convert("L")) for sample in splits.unlabelled]

    def ids(place: Mesh, **changes: int) -> list[torch.Tensor]:
        found = take(train_loader(config, splits, place, unlabelled=16, ids=True, **changes), 4)
        assert all(batch.unlabelled_ids is not None for batch in found)
        return [batch.unlabelled_ids for batch in found if batch.unlabelled_ids is not None]

    alone = take(train_loader(config, splits, mesh(), unlabelled=16, ids=True), 4)
    assert 16 < count < 48
    for batch in alone:
        for image, place in zip(batch.weak, batch.unlabelled_ids.tolist(), strict=True):
            assert np.array_equal(image[0].numpy(), pixels[place])
    whole = [batch.unlabelled_ids for batch in alone]
    assert sorted(torch.cat(whole)[:count].tolist()) == list(range(count))
    parts = [ids(mesh(2, index, width=2)) for index in range(2)]
    assert all(torch.equal(torch.cat(both), one) for one, *both in zip(whole, *parts, strict=True))
    assert all(torch.equal(*both) for both in zip(whole[2:], ids(mesh(), start_step=2)[:2], strict=True))
    assert batches(digits, mesh(), steps=1)[0].unlabelled_ids is None


def test_streams_and_seeds_draw_different_batches(digits: DataConfig) -> None:
    reference = batches(digits, mesh(), steps=1)[0]
    for change in ({"stream": 2}, {"seed": 1}):
        assert not torch.equal(reference.weak, batches(digits, mesh(), steps=1, **change)[0].weak)


def test_labels_and_pixels_are_those_of_scikit_learn(digits: DataConfig) -> None:
    """Undo nothing: without weak view and normalisation DALI must return the data set's own values."""
    config = digits.model_copy(update=PLAIN | {"weak": WeakConfig()})
    grey, labels = load_digits(return_X_y=True)
    known = {
        np.round(image * 255 / 16).astype(np.uint8).tobytes(): label for image, label in zip(grey, labels, strict=True)
    }
    assert len(known) == 1797  # no two digits are alike
    for batch in batches(config, mesh(), steps=6, labelled=40, dtype=torch.float64):
        pixels = (batch.labelled * 255).round().to(torch.uint8)
        assert torch.equal(pixels[:, :1].expand(-1, 3, -1, -1), pixels)
        assert [known[image[0].numpy().tobytes()] for image in pixels] == batch.labels.tolist()


def test_weak_view_is_a_padded_crop_then_a_flip(digits: DataConfig) -> None:
    config = digits.model_copy(update=PLAIN)
    splits = splits_of(config)
    allowed: dict[bytes, int] = {}
    for sample in splits.labelled:
        image = np.asarray(Image.open(splits.images.paths[sample]))
        padded = np.pad(image, 1, constant_values=7)
        for top, left in itertools.product(range(3), repeat=2):
            window = padded[top : top + 8, left : left + 8]
            allowed[window.tobytes()] = allowed[window[:, ::-1].tobytes()] = splits.images.labels[sample]
    seen = set()
    for batch in batches(config, mesh(), steps=10, labelled=40, dtype=torch.float64):
        views = (batch.labelled[:, 0] * 255).round().to(torch.uint8).numpy()
        assert [allowed[view.tobytes()] for view in views] == batch.labels.tolist()
        seen |= {view.tobytes() for view in views}
    assert len(seen) > 200  # 400 draws among 40 images x 18 views


def test_normalisation_and_strong_view(digits: DataConfig) -> None:
    raw = batches(digits.model_copy(update=PLAIN), mesh(), steps=1, dtype=torch.float64)[0]
    batch = batches(digits, mesh(), steps=1, dtype=torch.float64)[0]
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (digits.mean, digits.std))
    for name in ("labelled", "weak", "strong"):
        expected = (getattr(raw, name) - mean) / std
        torch.testing.assert_close(getattr(batch, name), expected, rtol=0, atol=1e-12)  # float64, values below 10
    half = batches(digits, mesh(), steps=1, dtype=torch.bfloat16)[0]
    assert half.weak.dtype == torch.bfloat16
    same = batches(digits, mesh(), steps=1, strong_view=None)[0]
    assert torch.equal(same.strong, same.weak)
    assert not torch.equal(batch.strong, batch.weak)


def test_no_unlabelled_images(digits: DataConfig) -> None:
    batch = batches(digits, mesh(), steps=1, unlabelled=0)[0]
    assert batch.labelled.shape == (8, 3, 8, 8)
    assert batch.weak.shape == batch.strong.shape == (0, 3, 8, 8)


def test_nothing_trains_on_the_test_split(digits: DataConfig) -> None:
    splits = splits_of(digits)
    assert abs(len(splits.test) - 1797 / 3) <= 5  # rounded once per class
    assert len(splits.labelled) == 40
    loader = train_loader(digits, splits, mesh(), labelled=100, unlabelled=600)
    used = set()
    for request in itertools.islice(loader._requests(0), 5):
        used |= {sample for rows in request for sample in rows.samples.tolist()}
    loader.close()
    assert used == set(splits.unlabelled)
    assert not used & set(splits.test)


@pytest.mark.parametrize(("data", "per_rank"), [(1, 256), (2, 100), (3, 7), (4, 1000)])
def test_evaluation_covers_each_test_image_once(digits: DataConfig, data: int, per_rank: int) -> None:
    config = digits.model_copy(update=PLAIN | {"evaluation_batch": per_rank})
    splits = splits_of(config)
    expected = sorted(np.asarray(Image.open(path)).tobytes() for path in splits.images.paths[splits.test])
    seen, shapes = [], set()
    for index in range(data):
        taken = list(evaluation_batches(config, splits, images=ImageFormat(image_size=8), mesh=mesh(data, index)))
        assert all(len(batch.images) <= per_rank for batch in taken)
        shapes.add((len(taken), *{batch.images.shape for batch in taken}))
        for images, labels, valid in taken:
            pixels = (images[valid][:, 0] * 255).round().to(torch.uint8).numpy()
            seen += [(image.tobytes(), int(label)) for image, label in zip(pixels, labels[valid], strict=True)]
    assert len(shapes) == 1  # every rank: as many batches, of one size
    assert sorted(image for image, _ in seen) == expected
    assert np.bincount([label for _, label in seen]).tolist() == np.bincount(splits.images.labels[splits.test]).tolist()


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    write_folder(tmp_path / "root", images=12, side=20)
    config = DataConfig(source="folder", root=str(tmp_path / "root"), **PLAIN)
    (batch,) = evaluation_batches(config, splits_of(config), images=ImageFormat(image_size=10), mesh=mesh())
    path = splits_of(config).images.paths[splits_of(config).test[0]]
    expected = np.asarray(Image.open(path).resize((10, 10), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    difference = ((batch.images[0] * 255).round().numpy() - expected)[:, 1:-1, 1:-1]
    assert np.abs(difference).max() <= 1  # the same antialiased filter; rounding and the rule at the border differ


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (4, {"labelled": 10}, r"labelled batch 10 = 4 data ranks x 2\.5 images per rank, not a whole number"),
        (4, {"unlabelled": 6}, r"unlabelled batch 6 = 4 data ranks x 1\.5 images per rank"),
        (64, {"labelled": 64, "unlabelled": 0}, r"= 4 x 10 classes = 40 labelled images for 64 data ranks"),
    ],
)
def test_impossible_layouts_are_refused(digits: DataConfig, data: int, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(digits, mesh(data), steps=1, **changes)


def test_no_image_left_without_a_label_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "root", images=6)
    config = DataConfig(source="folder", root=str(tmp_path / "root"), unlabelled_from="rest", labelled_per_class=4)
    with pytest.raises(ValueError, match=r"unlabelled_from = 'rest' leaves no unlabelled images"):
        batches(config, mesh(), steps=1)
